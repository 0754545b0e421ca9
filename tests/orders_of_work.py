"""Runs a stage whose workers finish in another order."""

from ropewalk.stages.context import LocalContext, Output, is_class


class BackwardContext(LocalContext):
    """Works on the last item first, as other workers may; results still come in item order."""

    def map(self, function, items, *, resources=None):
        run = function() if is_class(function) else function
        results = [run(item) for item in reversed(list(items))]
        return iter(results[::-1])


def run_backwards(stage, config, inputs, folder):
    """As `row_invariants.run_stage`, in that order. Returns the data folder."""
    output = Output(folder / "data", folder / "observed")
    for path in (output.data, output.observed, folder / "work"):
        path.mkdir(parents=True)
    stage.run(config, inputs, output, BackwardContext(folder / "work"))
    return output.data
