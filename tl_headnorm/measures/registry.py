"""Measures of a run by name, or from a Python file of the user's own."""

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from tl_headnorm.engine.memory import is_out_of_memory
from tl_headnorm.errors import InputError, first_line, unknown
from tl_headnorm.measures.activations import LayerActivations
from tl_headnorm.measures.table import MEASURES, READS, TOKENS, Measure


def choose_measures(
    names: str | Sequence[str], file: str | Path | None = None, *, scored: bool = True
) -> tuple[Measure, ...]:
    """The measures named, each once; `all` is every one, those of `file` too.

    Without `scored` answers `all` leaves out what needs them. Raises InputError.
    """
    known = MEASURES | (load_measures(file) if file is not None else {})
    asked = [names] if isinstance(names, str) else list(names)
    found: dict[str, Measure] = {}
    for name in (part.strip() for text in asked for part in text.split(",")):
        if name == "all":
            found |= {n: m for n, m in known.items() if scored or "answer" not in m.reads}
        elif name not in known:
            raise unknown("measure", name, [*known, "all"])
        else:
            found[name] = known[name]
    if not found:
        raise InputError("measures: expected at least one, found none; try --measures all")
    needy = [name for name, measure in found.items() if "answer" in measure.reads]
    if needy and not scored:
        raise InputError(
            f"measures: expected score_answers true for {needy[0]}, which looks at the answer's "
            "letter, found false; leave it out or score the answers"
        )
    return tuple(found.values())


def load_measures(path: str | Path) -> dict[str, Measure]:
    """MEASURES of a Python file of the user's own, which is run. Raises InputError in one line."""
    where = Path(path).expanduser()
    spec = importlib.util.spec_from_file_location("tl_headnorm_measures_file", where)
    try:
        if spec is None or spec.loader is None:
            raise ImportError("no Python file")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found = module.MEASURES
    except Exception as error:  # the file may raise anything
        raise InputError(
            f"measures_file: expected Python that defines MEASURES, found {where} "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(m, Measure) for m in found.values()):
        raise InputError(
            f"measures_file: expected MEASURES in {where} to be a dict of names to Measure, found "
            f"{type(found).__name__}"
        )
    for name, measure in found.items():
        _check_measure(str(name), measure)
    return {
        name: replace(measure, source=str(where), compute=_guarded(measure, str(where)))
        for name, measure in found.items()
    }


def _guarded(measure: Measure, source: str) -> Callable[[LayerActivations], Tensor]:
    """Its values at every query; a fault in the user's code is one line."""

    def compute(activations: LayerActivations) -> Tensor:
        try:
            values = measure.compute(activations)
        except InputError:
            raise
        except Exception as error:  # code that is not ours may raise anything
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            raise InputError(
                f"{source}: measure {measure.name} failed ({type(error).__name__}: "
                f"{first_line(error)})"
            ) from error
        shape = activations.z.shape[:3]
        if not isinstance(values, Tensor) or values.shape != shape:
            given = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InputError(
                f"{source}: expected measure {measure.name} to give a tensor [batch, pos, "
                f"head] of {tuple(shape)}, found {given}"
            )
        return values.to(activations.weights.factor.dtype)

    return compute


def _check_measure(name: str, measure: Measure) -> None:
    def refuse(expected: str, given: object) -> InputError:
        return InputError(f"measures_file: expected {expected} for {name!r}, found {given}")

    if name != measure.name:
        raise refuse("its own name as the key", repr(measure.name))
    if name in MEASURES:
        raise refuse("a new name", "one that the package has")
    if not re.fullmatch(r"[A-Za-z]\w*", name) or re.search(r"_(mean|std|n|M2)$", name):
        raise refuse("a name of letters, digits and _ that ends in no _mean, _std, _n or _M2", name)
    if measure.tokens not in TOKENS:
        raise refuse(f"tokens among {', '.join(TOKENS)}", repr(measure.tokens))
    if "z" not in measure.reads or not set(measure.reads) <= set(READS):
        raise refuse(f"reads with z, among {', '.join(READS)}", measure.reads)
    if "answer" in measure.reads and measure.tokens != "last":
        raise refuse("tokens 'last', where the answer is said,", repr(measure.tokens))
