"""Merge fine-tuned checkpoints into one model, under a preference, with a measured card.

Names are loaded when they are first used: importing the package costs milliseconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hub_magmax.errors import HubMagmaxError as HubMagmaxError
    from hub_magmax.evaluation.blind_spot_measuring import blindspots as blindspots
    from hub_magmax.evaluation.scoring import evaluate as evaluate
    from hub_magmax.evaluation.tail_shape import compare_tails as compare_tails
    from hub_magmax.fleet.applying import apply as apply
    from hub_magmax.fleet.canaries import canary as canary
    from hub_magmax.fleet.history import history as history
    from hub_magmax.fleet.rebuilding import rebuild as rebuild
    from hub_magmax.fleet.recording import recording as recording
    from hub_magmax.fleet.replaying import replay as replay
    from hub_magmax.fleet.rollback import rollback as rollback
    from hub_magmax.fleet.routing.fitting import route as route
    from hub_magmax.fleet.routing.router import Router as Router
    from hub_magmax.fleet.signing import sign as sign
    from hub_magmax.fleet.status import fleet_status as fleet_status
    from hub_magmax.fleet.verifying import verify as verify
    from hub_magmax.merging.execution import merge as merge
    from hub_magmax.merging.state_dicts import merge_state_dicts as merge_state_dicts
    from hub_magmax.merging.tensors import merge_tensors as merge_tensors
    from hub_magmax.methods import merge_method as merge_method
    from hub_magmax.pipeline import lock as lock
    from hub_magmax.pipeline import plan as plan
    from hub_magmax.pipeline import run as run
    from hub_magmax.planning.summary import explain as explain
    from hub_magmax.preference.labels import preference_from_labels as preference_from_labels
    from hub_magmax.publishing.pushing import push as push
    from hub_magmax.recipe.loading import load_recipe as load_recipe
    from hub_magmax.recipe.loading import parse_recipe as parse_recipe
    from hub_magmax.recipe.schema import Recipe as Recipe
    from hub_magmax.reporting.card import render_card as render_card
    from hub_magmax.reporting.card_file import write_card as write_card
    from hub_magmax.studies import compare as compare
    from hub_magmax.studies import diagnose as diagnose
    from hub_magmax.studies import picture as picture
    from hub_magmax.studies import predict_merge as predict_merge
    from hub_magmax.studies import prefer as prefer
    from hub_magmax.studies import run_sites as run_sites
    from hub_magmax.studies import sweep as sweep
    from hub_magmax.training.alternating import alternate as alternate
    from hub_magmax.training.finetuning import finetune as finetune

__version__ = "0.1.0"

_HOMES = {
    "HubMagmaxError": "errors",
    "Recipe": "recipe.schema",
    "Router": "fleet.routing.router",
    "alternate": "training.alternating",
    "apply": "fleet.applying",
    "blindspots": "evaluation.blind_spot_measuring",
    "canary": "fleet.canaries",
    "compare": "studies",
    "compare_tails": "evaluation.tail_shape",
    "diagnose": "studies",
    "evaluate": "evaluation.scoring",
    "explain": "planning.summary",
    "finetune": "training.finetuning",
    "fleet_status": "fleet.status",
    "history": "fleet.history",
    "load_recipe": "recipe.loading",
    "lock": "pipeline",
    "merge": "merging.execution",
    "merge_method": "methods",
    "merge_state_dicts": "merging.state_dicts",
    "merge_tensors": "merging.tensors",
    "parse_recipe": "recipe.loading",
    "picture": "studies",
    "plan": "pipeline",
    "predict_merge": "studies",
    "prefer": "studies",
    "preference_from_labels": "preference.labels",
    "push": "publishing.pushing",
    "rebuild": "fleet.rebuilding",
    "recording": "fleet.recording",
    "render_card": "reporting.card",
    "replay": "fleet.replaying",
    "rollback": "fleet.rollback",
    "route": "fleet.routing.fitting",
    "run": "pipeline",
    "run_sites": "studies",
    "sign": "fleet.signing",
    "sweep": "studies",
    "verify": "fleet.verifying",
    "write_card": "reporting.card_file",
}

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604  # the names are the table's keys


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hub_magmax' has no attribute {name!r}")
    return getattr(import_module(f"hub_magmax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
