"""The contract of graph passes: what a pass is given, what it promises, what it says afterwards."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from .plan import Plan


class ContractError(RuntimeError):
    """A pass found its precondition unmet or broke its postcondition: a bug in claq, not in the user's model."""


@dataclass
class PassContext:
    """What passes know about a model beside its graph, and what they hand on to one another.

    Attributes:
        task: the model's task, or None.
        aliases: state_dict name -> other names of the same tensor.
        reasons: node name -> why it is not treated as a linear layer, where it looks like one.
        chosen: names of the layers to quantize, where another graph of the model has been planned; None: the passes choose.
        plan: the linears to quantize, once :class:`~claq_export.passes.select_linears.SelectLinears` has run.
    """

    task: str | None = None
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    chosen: frozenset[str] | None = None
    plan: Plan | None = None


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        graph_module: the graph, rewritten in place.
        modified: whether the graph is another one than before.
        notes: one line for each thing worth telling (what was rewritten, what was left and why).
    """

    graph_module: fx.GraphModule
    modified: bool
    notes: tuple[str, ...] = ()


class Pass(abc.ABC):
    """A rewriting or an analysis of the graph with checked pre- and postconditions.

    Calling a pass checks ``requires``, runs it, lints and recompiles a modified graph, and checks ``ensures``.
    """

    name: ClassVar[str]
    doc: ClassVar[str]

    def requires(self, gm: fx.GraphModule) -> None:  # noqa: B027 - most passes need nothing special
        """Raise :class:`ContractError` if the pass cannot start from this graph."""

    def ensures(self, gm: fx.GraphModule) -> None:  # noqa: B027 - most passes promise nothing special
        """Raise :class:`ContractError` if the graph is not as the pass promises."""

    @abc.abstractmethod
    def run(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        """Do the work, in place."""

    def __call__(self, gm: fx.GraphModule, context: PassContext) -> PassResult:
        """Run the pass with its checks.

        Raises:
            ContractError: a condition does not hold; the message names the pass.
        """
        try:
            self.requires(gm)
            result = self.run(gm, context)
            if result.modified:
                result.graph_module.graph.lint()
                result.graph_module.recompile()
            self.ensures(result.graph_module)
        except ContractError as error:
            raise ContractError(f"pass {self.name}: {error}") from error
        return result
