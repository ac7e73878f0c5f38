"""How large each layer will be: predictions before calibration, and the bit budget that decides it.

Everything is counted as the artifact stores it (docs/format.md). A budget is for the whole model: columns and outliers of all
layers compete for it, those of embeddings and output heads too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from .algorithm import predict
from .algorithm.budget import Budget, LayerProfile, solve
from .algorithm.settings import LayerSettings
from .calibration.stage import column_counts
from .config import NO_CALIBRATION, Config
from .deferred import weight_bytes
from .errors import ConfigError
from .format.layer import index_dtype
from .format.packing import WIDTHS
from .passes import LinearSite, Plan
from .passes.plan import HEAD_ROLE, LINEAR_ROLE

_NODE_BYTES = 450
"""What a graph node takes in an ONNX file, names and small constants included, seen on encoders and decoders."""

_BUDGET_TOLERANCE = 1.01
"""A prediction may miss a budget by this factor: it shares bits out by formula, the solver by measured errors."""


@dataclass(frozen=True)
class PlannedLayer:
    """What will become of one linear layer (or stack of siblings), before any calibration.

    Attributes:
        name: of the site.
        parts: qualified names of the linears stacked in it.
        out_features, in_features: shape of the weight.
        columns: input features at 4, 3 and 2 bits.
        dense_bytes: of the weight now.
        nbytes, true_bits, nominal_bits: predicted.
        role: ``"linear"``, ``"head"`` or ``"embedding"``, see :class:`~claq_export.passes.LinearSite`.
        tied: it is both an embedding and a linear.
    """

    name: str
    parts: tuple[str, ...]
    out_features: int
    in_features: int
    columns: tuple[int, int, int]
    dense_bytes: int
    nbytes: int
    true_bits: float
    nominal_bits: float
    role: str = LINEAR_ROLE
    tied: bool = False


@dataclass(frozen=True)
class Sizing:
    """Sizes of one model's layers under one configuration.

    Attributes:
        plan: what is to be quantized.
        graph_module: the captured graph, still with its original weights.
        config: the settings.
    """

    plan: Plan
    graph_module: torch.fx.GraphModule
    config: Config

    def predicted_layers(self) -> list[PlannedLayer]:
        """The plan with its predicted sizes, for ``--dry-run``.

        With a budget, which layer gets which columns is known after calibration only: the prediction gives each the
        same mix.

        Raises:
            ConfigError: not even the narrowest columns meet the budget (says what they take), or a floor is for a layer
                that is not there.
        """
        settings = self.config.layer_settings()
        if not self.config.budgeted:
            return self._predict(settings, self.table_settings())
        self._floors(site.name for site in self.plan.sites)
        planned = self._predict_budget(settings)
        least = sum(layer.nbytes for layer in planned)
        if 8 * least <= self._target_bits() * _BUDGET_TOLERANCE * self._weights():
            return planned
        others = self.unquantized_bytes()
        raise self._cannot_meet(
            f"the budget of {self.config.bits:g} true bits a weight cannot be met: the narrowest columns take "
            f"{8 * least / self._weights():.3f}"
            if self.config.size is None
            else f"a size of {self.config.size:,} bytes cannot be met: the narrowest columns take {least:,}, and what is "
            f"not quantized {others:,}"
        )

    def _cannot_meet(self, refusal: str) -> ConfigError:
        """The refusal of a budget, with what tables leave to change, if there are any."""
        if not self.table_settings():
            return ConfigError(refusal)
        exact = ", --exact-tokens 0" if self._exact_tokens() else ""
        return ConfigError(
            f"{refusal}; embeddings and heads are counted: give more, or narrow them (--embedding-bits, --head-bits{exact})"
        )

    def _weights(self) -> int:
        """Number of weights that are to be quantized."""
        return sum(site.in_features * site.out_features for site in self.plan.sites)

    def _target_bits(self) -> float:
        """The budget in true bits a weight."""
        if self.config.size is None:
            return float(self.config.bits)
        return 8 * (self.config.size - self.unquantized_bytes()) / max(self._weights(), 1)

    def table_settings(self, bits: float | None = None) -> dict[str, LayerSettings]:
        """Settings of tables and heads by name.

        Args:
            bits: with a budget, their nominal width where the configuration asks for less or for none.
        """
        chosen = {}
        for site in self.plan.sites:
            if site.role != LINEAR_ROLE or site.lookups:
                width = self._table_width(site)
                settings = replace(self.config.layer_settings(), exact_rows=self._exact_tokens())
                if not self.config.budgeted:
                    settings = replace(settings, bits=float(width or max(WIDTHS)), widths=None, shares=None)
                elif bits is not None:
                    settings = replace(settings, bits=max(bits, width or min(WIDTHS)))
                if not site.nodes and "frequency_power" not in self.config.algorithm:
                    # Beside exact rows a table that is only looked up gains next to nothing, and tokens unlike those of the
                    # calibration data lose (docs/algorithm.md).
                    settings = replace(settings, frequency_power=0.0)
                chosen[site.name] = settings
        return chosen

    def _table_width(self, site: LinearSite) -> int | None:
        """The width that was asked for of a table or a head; with a budget the least one of its columns."""
        return self.config.table_bits(head=site.role == HEAD_ROLE, embedding=bool(site.lookups))

    def _predict_budget(self, settings: LayerSettings) -> list[PlannedLayer]:
        """All layers at the nominal width at which they take the budget together."""
        target, low, high = self._target_bits(), 2.0, 4.0
        for _ in range(12):
            middle = (low + high) / 2
            planned = self._predict(replace(settings, bits=middle), self.table_settings(middle))
            size = sum(layer.nbytes for layer in planned)
            low, high = (middle, high) if 8 * size / self._weights() < target else (low, middle)
        tables = self.table_settings(low)
        planned = self._predict(replace(settings, bits=low), tables)
        share = 0.0
        for _ in range(2 if high == 4.0 else 0):
            # Above the widest code a budget is spent on outliers of 32 bits; the second round knows their row pointers.
            missing = target - 8 * sum(layer.nbytes for layer in planned) / self._weights()
            share = min(max(share + missing / 32, 0.0), 0.25)
            planned = self._predict(replace(settings, bits=4.0, outliers=share), tables)
        return planned

    def _predict(self, settings: LayerSettings, tables: Mapping[str, LayerSettings]) -> list[PlannedLayer]:
        ordinary = [site for site in self.plan.sites if site.name not in tables]
        shared = dict(zip((site.name for site in ordinary), column_counts(ordinary, settings), strict=True))
        planned = []
        for site in self.plan.sites:
            own = tables.get(site.name, settings)
            widths, _ = own.mix()
            counts = shared.get(site.name) or column_counts([site], own)[0]
            by_width = dict(zip(widths, counts, strict=True))
            columns = tuple(by_width.get(width, 0) for width in WIDTHS)
            weights = site.in_features * site.out_features
            exact = round(own.exact_rows * site.out_features)
            outliers = [round(own.outliers * weights * count / site.in_features) + exact * count for count in columns]
            bits = predict(site.out_features, site.in_features, columns, outliers)
            planned.append(
                PlannedLayer(
                    name=site.name,
                    parts=tuple(name for name, _ in site.parts),
                    out_features=site.out_features,
                    in_features=site.in_features,
                    columns=(columns[0], columns[1], columns[2]),
                    dense_bytes=site.dense_bytes,
                    nbytes=bits.nbytes,
                    true_bits=bits.true_bits,
                    nominal_bits=bits.nominal_bits,
                    role=site.role,
                    tied=bool(site.nodes and site.lookups),
                )
            )
        return planned

    def solve_budget(self, profiles: Sequence[LayerProfile]) -> Budget:
        """Widths and outliers of all columns by layer.

        Args:
            profiles: of every layer, what its columns gain from bits and outliers.

        Raises:
            ConfigError: the budget cannot be met, or a floor is for a layer that is not there.
        """
        floors = self._floors(profile.name for profile in profiles)
        if self.config.size is not None and self.config.size <= (others := self.unquantized_bytes()):
            raise ConfigError(
                f"a size of {self.config.size:,} bytes cannot be met: what is not quantized takes {others:,} already"
            )
        tables = self.table_settings()
        for name in tables:
            floors[name] = max(floors.get(name, 0), self._table_width(self.plan.site(name)) or 0)
        room = int(self._target_bits() * self._weights() / 8)
        room -= sum(self._exact_bytes(name, settings) for name, settings in tables.items())
        try:
            if room <= 0:
                raise ConfigError("the budget cannot be met: rows that are stored exactly take more")
            return self._solve_with_pointers(profiles, room, floors, tables)
        except ConfigError as error:
            raise self._cannot_meet(str(error)) from error

    def _floors(self, layers: Iterable[str]) -> dict[str, int]:
        """Least width by name, of those layers that have one.

        Raises:
            ConfigError: a pattern matches none of them.
        """
        names = list(layers)
        floors: dict[str, int] = {}
        for pattern, width in self.config.floors.items():
            matching = [name for name in names if fnmatchcase(name, pattern)]
            if not matching:
                raise ConfigError(f"--floor {pattern}={width}: no layer to quantize matches")
            floors.update({name: max(width, floors.get(name, 0)) for name in matching})
        return floors

    def _solve_with_pointers(
        self, profiles: Sequence[LayerProfile], room: int, floors: Mapping[str, int], tables: Iterable[str]
    ) -> Budget:
        """Solve so that the row pointers of exact rows fit in too, where a table reserves nothing else that needs them."""
        pointers = {name: 4 * (self.plan.site(name).out_features + 1) for name in tables if self._exact_tokens()}
        alone: set[str] = set()
        while True:
            budget = solve(profiles, nbytes=room - sum(pointers[name] for name in alone), floors=floors)
            found = {name for name in pointers if not budget.plans[name].reserve.any()}
            if found <= alone:
                return budget
            alone |= found

    def _exact_tokens(self) -> float:
        """Share of a vocabulary's rows that is stored exactly; which ones is known from calibration data alone."""
        return 0.0 if self.config.calibration == NO_CALIBRATION else self.config.exact_tokens

    def _exact_bytes(self, name: str, settings: LayerSettings) -> int:
        """What the exact rows of a table take, without row pointers."""
        site = self.plan.site(name)
        rows = round(settings.exact_rows * site.out_features)
        return rows * site.in_features * (2 + index_dtype(site.in_features).itemsize)

    def unquantized_bytes(self) -> int:
        """Bytes of the artifact beside the quantized layers: tensors left alone, and the graph itself (estimated)."""
        graph = self.graph_module
        planned = sum(site.dense_bytes for site in self.plan.sites)
        others = (weight_bytes(graph) - planned) * self.config.torch_dtype.itemsize // torch.float32.itemsize
        return others + _NODE_BYTES * len(graph.graph.nodes)
