"""The options that several commands share: each is described once, and means the same everywhere.

A command takes a whole group as one parameter, as in `def run(asked: PipelineOptions, ...)`; `app.command` spreads it
into the options of its fields.
"""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from ropewalk.pipelines import completion

if TYPE_CHECKING:
    from ropewalk.infra.plan import Selection
    from ropewalk.infra.runner import RunPolicy

DEFAULT_STORE = ".ropewalk"
DASHBOARD = "http://127.0.0.1:8265"

PIPELINE = "A name in pipelines/ (quickstart) or a Python file with pipeline()."
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="A run id, or `last`.", autocompletion=completion.runs)]
OptionalRunArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RUN]", help="A run id; default: the last run.", autocompletion=completion.runs),
]
StepArgument = Annotated[str, typer.Argument(help="Name of a step.", autocompletion=completion.steps)]
OptionalStepArgument = Annotated[str | None, typer.Argument(help="Name of a step.", autocompletion=completion.steps)]
StoreOption = Annotated[
    str,
    typer.Option(
        "--store",
        metavar="URI",
        help="Root of the store: a folder, or s3://bucket/prefix, gs://..., az://...",
        envvar="ROPEWALK_STORE",
        autocompletion=completion.folders,
    ),
]
StepsOption = Annotated[list[str], typer.Option(metavar="STEP", help="Repeatable.", autocompletion=completion.steps)]
AddressOption = Annotated[str | None, typer.Option(help="Ray cluster to run on; default: this machine.")]
ExecutorOption = Annotated[Literal["ray", "local"], typer.Option(help="local: one step at a time, in this process.")]
JobAddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="Ask this cluster about a submitted run, as long as the store does not know it or is out of reach.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="End standard output with one JSON object on one line.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@dataclass(frozen=True, kw_only=True)
class SettingOptions:
    """What is changed in a pipeline."""

    set_: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="STEP.FIELD=VALUE",
            help="Change a config field; repeatable.",
            autocompletion=completion.settings,
        ),
    ] = field(default_factory=list)
    param: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=VALUE",
            help="Pass a parameter to pipeline(); repeatable.",
            autocompletion=completion.parameters,
        ),
    ] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PipelineOptions(SettingOptions):
    """Which pipeline, and what is changed in it."""

    pipeline: Annotated[str, typer.Argument(metavar="PIPELINE", help=PIPELINE, autocompletion=completion.pipelines)]

    @property
    def request(self) -> dict[str, Any]:
        """The same as a run's record keeps it."""
        return {"pipeline": self.pipeline, "set": self.set_, "param": self.param}


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """Which steps a run is about."""

    only: StepsOption = field(default_factory=list)
    from_: Annotated[
        list[str],
        typer.Option(
            "--from", metavar="STEP", help="This step and what depends on it.", autocompletion=completion.steps
        ),
    ] = field(default_factory=list)
    until: Annotated[
        list[str],
        typer.Option(metavar="STEP", help="This step and what it depends on.", autocompletion=completion.steps),
    ] = field(default_factory=list)
    force: Annotated[
        list[str],
        typer.Option(metavar="STEP", help="Run this step anew, even if it is fresh.", autocompletion=completion.steps),
    ] = field(default_factory=list)
    with_upstream: Annotated[
        bool, typer.Option("--with-upstream", help="With --only: and what the steps depend on.")
    ] = False
    rerun_failed: Annotated[
        bool, typer.Option("--rerun-failed", help="Only the steps whose last attempt failed, and what they depend on.")
    ] = False
    rerun_drifted: Annotated[
        bool, typer.Option("--rerun-drifted", help="Run anew what was made by code that has changed since.")
    ] = False

    @property
    def selection(self) -> Selection:
        """The same as the engine takes it."""
        from ropewalk.infra.plan import Selection

        names = (tuple(self.only), tuple(self.from_), tuple(self.until), tuple(self.force))
        return Selection(*names, self.with_upstream, self.rerun_failed, self.rerun_drifted)


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """How a run goes about its steps."""

    on_locked: Annotated[
        Literal["wait", "fail", "skip"], typer.Option(help="What to do about a step that another run works on.")
    ] = "wait"
    fail_fast: Annotated[
        bool,
        typer.Option("--fail-fast/--keep-going", help="After a failure start nothing more, or what does not need it."),
    ] = False
    max_parallel: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="At most so many steps at the same time.")
    ] = None
    wait_for_resources: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Wait so long for a cluster that grows to have room.")
    ] = 0.0

    @property
    def policy(self) -> RunPolicy:
        """The same as the engine takes it."""
        from ropewalk.infra.runner import RunPolicy

        return RunPolicy(self.on_locked, self.fail_fast, self.max_parallel)


def default_of(each: Field[Any]) -> Any:
    """The default of an option; MISSING if it must be given."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def as_arguments(group: Any) -> list[str]:
    """The words that ask a command for the same as this group of options. Positional arguments are left out."""
    hints = get_type_hints(type(group), include_extras=True)
    words: list[str] = []
    for each in fields(group):
        option, value = hints[each.name].__metadata__[0], getattr(group, each.name)
        if isinstance(option, typer.models.OptionInfo) and value != default_of(each):
            # typer keeps the first name where the default is when it stands alone.
            given = [name for name in (option.default, *(option.param_decls or ())) if isinstance(name, str)]
            flag = (given or [f"--{each.name.replace('_', '-')}"])[0].partition("/")[0]
            values = value if isinstance(value, list) else [value]
            words += [flag] if value is True else [word for one in values for word in (flag, str(one))]
    return words
