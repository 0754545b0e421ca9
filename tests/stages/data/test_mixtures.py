import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ropewalk.stages.data.mix import MixConfig
from ropewalk.stages.data.mixtures import (
    CURRICULA,
    LLAMA_2_LONG,
    OLMO_3_LONGMINO,
    PROLONG,
    PROLONG_64K_MIXTURE,
    PROLONG_512K_MIXTURE,
    WINDOWS_TOKENS,
    Curriculum,
    Mixture,
    Part,
    find_curriculum,
    grow_windows,
)

PHASES = [phase for curriculum in CURRICULA.values() for phase in curriculum.phases]


@pytest.mark.parametrize("phase", PHASES, ids=lambda phase: phase.name)
def test_every_published_mixture_is_a_config_of_mix(phase):
    names = [part.name for part in phase.mixture.parts]
    fractions = phase.mixture.fractions(names)
    config = MixConfig(fractions=fractions, num_rows=phase.num_rows(10**9))
    assert config.fractions == {part.name: part.fraction for part in phase.mixture.parts}
    assert config.num_rows == 10**9 // phase.row_tokens
    assert phase.mixture.source and phase.notes


@given(st.sets(st.sampled_from([part.name for part in PROLONG_64K_MIXTURE.parts]), min_size=1))
def test_parts_that_are_there_keep_their_relations(given_names):
    fractions = PROLONG_64K_MIXTURE.fractions(given_names, missing="renormalise")
    assert set(fractions) == given_names
    MixConfig(fractions=fractions, num_rows=1)
    shares = {part.name: part.fraction for part in PROLONG_64K_MIXTURE.parts}
    first = next(iter(fractions))
    for name in fractions:
        assert fractions[name] / fractions[first] == pytest.approx(shares[name] / shares[first])
    left = 1 - sum(shares[name] for name in given_names)
    assert PROLONG_64K_MIXTURE.missing_fraction(given_names) == pytest.approx(left, abs=1e-9)


def test_missing_and_unknown_parts_are_named():
    names = [part.name for part in PROLONG_64K_MIXTURE.parts]
    with pytest.raises(ValueError, match="mixture prolong-64k also needs books, textbooks: give them"):
        PROLONG_64K_MIXTURE.fractions([name for name in names if name not in ("books", "textbooks")])
    with pytest.raises(ValueError, match="also needs code_repos, books"):
        PROLONG_64K_MIXTURE.fractions([], missing="renormalise")
    with pytest.raises(ValueError, match=r"no part 'book': did you mean 'books'\?"):
        PROLONG_64K_MIXTURE.fractions([*names, "book"])
    with pytest.raises(ValueError, match=r"no curriculum 'prolog': did you mean 'prolong'\?"):
        find_curriculum("prolog")
    assert find_curriculum("olmo-3-longmino") is OLMO_3_LONGMINO


def test_prolong_is_as_published():
    first, second = PROLONG.phases
    assert (first.row_tokens, second.row_tokens) == (65_536, 524_288)
    assert (first.rope_theta, second.rope_theta) == (8e6, 1.28e8)
    assert (first.learning_rate, second.learning_rate) == (1e-5, 5e-6)
    for phase in PROLONG.phases:
        assert phase.num_steps * phase.batch_tokens == phase.num_tokens == 20_971_520_000
        assert phase.num_rows() == phase.num_tokens // phase.row_tokens
    long_share = sum(part.fraction for part in PROLONG_64K_MIXTURE.parts if part.unit_tokens)
    assert long_share == pytest.approx(0.6)
    by_name = {part.name: part for part in PROLONG_512K_MIXTURE.parts}
    assert [by_name[f"{kind}_{unit}"].fraction for kind in ("code_repos", "books") for unit in ("512k", "64k")] == [
        0.15,
        0.15,
        0.05,
        0.25,
    ]
    short = {part.name: part.fraction for part in PROLONG_64K_MIXTURE.parts if not part.unit_tokens}
    assert short == {part.name: part.fraction for part in PROLONG_512K_MIXTURE.parts if not part.unit_tokens}


def test_what_was_not_published_is_not_there():
    phase = LLAMA_2_LONG.phases[0]
    assert phase.batch_tokens is None and phase.num_steps is None and phase.learning_rate is None
    assert OLMO_3_LONGMINO.phases[0].mixture.fractions(["long", "short"]) == {"long": 0.34, "short": 0.66}


def test_windows_grow_and_say_how_many_rows_they_need():
    mixture = OLMO_3_LONGMINO.phases[0].mixture
    curriculum = grow_windows(mixture, dict.fromkeys(WINDOWS_TOKENS, 2**21))
    assert [phase.row_tokens for phase in curriculum.phases] == [8192, 65_536, 524_288]
    assert [phase.num_rows() for phase in curriculum.phases] == [256, 32, 4]
    assert [phase.name for phase in curriculum.phases][-1] == "olmo-3-longmino-512k"
    with pytest.raises(ValidationError, match=r"windows must not shrink, but they are \[524288, 8192\]"):
        Curriculum(name="wrong", phases=(curriculum.phases[2], curriculum.phases[0]))
    with pytest.raises(ValueError, match="524287 tokens are less than one row of 524288"):
        curriculum.phases[2].num_rows(524_287)
    unknown = curriculum.phases[0].model_copy(update={"num_tokens": None})
    with pytest.raises(ValueError, match="was not published, so give num_tokens"):
        unknown.num_rows()


def test_parts_that_do_not_make_a_whole_are_refused():
    with pytest.raises(ValidationError, match=r"sum to 0\.9, not to 1"):
        Mixture(name="m", parts=(Part(name="a", fraction=0.9),), source="nobody")
    halves = (Part(name="a", fraction=0.5), Part(name="a", fraction=0.5))
    with pytest.raises(ValidationError, match="part 'a' occurs twice"):
        Mixture(name="m", parts=halves, source="nobody")
