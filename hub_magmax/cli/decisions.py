"""Verbs for decisions of models in use: predict, replay."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hub_magmax.cli.completing import FilePath
from hub_magmax.cli.options import STDIN, DecodingOptions, decoding_options, from_cache_option
from hub_magmax.cli.terminal import REGRESSED, Answer, progress, say, verb
from hub_magmax.text import listed, number_of

if TYPE_CHECKING:
    from hub_magmax.fleet.recording import Recorder

_column_option = click.option("--column", help="Column of INPUTS; `image` or `text`.")
_split_option = click.option("--split", default="test", show_default=True, help="Split of INPUTS.")


@verb
@click.argument("model")
@click.argument("inputs")
@click.option("--record", required=True, type=FilePath(), help="File to write, or to go on with.")
@_column_option
@_split_option
@click.option("--digest-inputs", is_flag=True, help="Record the sha256 of each input, not the input.")
@decoding_options
@from_cache_option
def predict(
    model: str,
    inputs: str,
    record: Path,
    column: str | None,
    split: str,
    digest_inputs: bool,
    how: DecodingOptions,
) -> Answer:
    """Ask MODEL about INPUTS, and record every decision.

    MODEL is a folder or a Hub id. INPUTS are a file or folder of data, or - for
    lines of text on standard input. Each input is run alone.

    \b
    Example:
      hub-magmax predict merged rows.parquet --record decisions.jsonl
    """
    from hub_magmax.evaluation.column_values import column_values, refuse_missing
    from hub_magmax.fleet.decision_inputs import lines_of
    from hub_magmax.fleet.predicting import INPUT_COLUMNS, Decoding, load_predictor, place_of
    from hub_magmax.fleet.recording import check_place, record_of

    check_place(record)
    if inputs != STDIN:
        refuse_missing(inputs, "inputs")  # before the model is fetched and loaded
    predictor = load_predictor(place_of(model), model, Decoding(**how.given()))
    values: Iterable[Any] = (
        lines_of(sys.stdin.buffer)
        if inputs == STDIN
        else column_values(inputs, column or INPUT_COLUMNS[predictor.task], split, "inputs")
    )
    with record_of(predictor, record, digest_inputs=digest_inputs) as ask:
        outputs = _ask_all(ask, values, record, split)
        last = ask.last
    lines = [_told(output) for output in outputs]
    lines.append(f"wrote {number_of(len(outputs), 'decision')} to {record}")
    if last is not None:
        lines.append(f"sha256 of the last line: {last}")
    return Answer({"record": str(record), "last": last, "outputs": outputs}, "\n".join(lines))


def _ask_all(ask: Recorder, values: Iterable[Any], record: Path, split: str) -> list[dict[str, Any]]:
    """Return the answers; when it is interrupted, say what the record has, and how to go on."""
    outputs: list[dict[str, Any]] = []
    total = len(values) if isinstance(values, Sized) else 0
    try:
        with progress(total, "asking the model", "decisions") as advance:
            for value in values:
                outputs.append(ask(value))
                advance(1)
    except KeyboardInterrupt as stopped:
        made = number_of(ask.num_decisions, "decision")
        hint = f"The record {record} holds {made} of this command, which would make them again."
        if total and "[" not in split:
            hint += f" To go on after them: --split '{split}[{ask.num_decisions}:]'."
        raise type(stopped)(hint) from None
    return outputs


#: Scores that are shown where no label is.
_MOST_SCORES = 5


def _told(output: dict[str, Any]) -> str:
    """Return an answer in a line: text, label with its logit, or scores."""
    if "text" in output:
        return repr(output["text"])
    scores = [f"{float(score):.4g}" for score in output["scores"]]
    if "label" in output:
        return f"{output['label']}  logit {max(scores, key=float)}"
    return listed(scores, _MOST_SCORES)


@verb
@click.argument("record", type=FilePath())
@click.option("--model", help="Where the model is now, if not where the record says.")
@click.option("--inputs", help="Data that has the inputs, if the record holds their sha256 alone.")
@_column_option
@_split_option
@from_cache_option
def replay(record: Path, model: str | None, inputs: str | None, column: str | None, split: str) -> Answer:
    """Make the decisions of RECORD again, and compare every bit.

    Lines that were changed, removed or moved are refused first. Exits with 3 if
    the model is another one, or a decision comes out otherwise.

    \b
    Example:
      hub-magmax replay decisions.jsonl
    """
    from hub_magmax.fleet.replaying import replay as do_replay

    found = do_replay(
        record, model=model, inputs=inputs, column=column, split=split, report=say, progress=progress
    )
    return Answer(found.to_dict(), found.text, exit_code=0 if found.is_same else REGRESSED)
