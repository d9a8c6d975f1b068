"""A model's blocks: its trainable parameters, divided in model order, each in exactly one block.

[Note: how blocks are found]
The rule reads the tree of modules, no table of architectures.

1. *Layers* are the members of the outermost ``nn.ModuleList``s and ``nn.Sequential``s that repeat a class.
   Lists of bare leaves (a ``ModuleList`` of ``Linear``) count only in a model that repeats nothing larger.
   A ``ModuleList`` of one larger module counts too where it has the name of such a list (a decoder of one layer
   beside an encoder of several) or, where nothing repeats, where the model's config counts layers.
2. The modules above the layers are the *trunk*. Any other module of the trunk is a *part*: before, between or
   after its layers in the order of registration, which is the order of use in nearly every model.
3. A part before the layers belongs to the embedding. After them, a norm is the final norm and the rest is the
   head; in a model of several stacks each has its own ("encoder.final_norm"). A part between two stacks is a
   block of its own, named by its path.
4. A *tower* is a module with layers, beside others with layers, that holds neither the token embedding nor what is
   tied to the output: a vision or audio encoder. Its part before the layers is a block of its own
   ("vision_tower.embedding").
5. Facts override the order: what holds an ``nn.Embedding`` is embedding, and so is each module
   tied to it; what ``get_output_embeddings`` returns is head; a norm that is named "final" is the final norm,
   though it stands before the layers (OPT's does).
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ds_agsel.config import SECTION, did_you_mean, quoted
from ds_agsel.errors import BlockError, ConfigError

Kind = Literal["block", "matrix", "norms", "vectors", "rest"]
EMBEDDING, FINAL_NORM, HEAD = "embedding", "final_norm", "head"

_LOGGER = logging.getLogger(__name__)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LISTED = 5  # parameters that an error lists; the rest is counted


@dataclass(frozen=True)
class Block:
    """Parameters selected together.

    Attributes:
        index: its place in the model's order, from 0.
        name: "embedding", "final_norm", "head", a module's path such as "model.layers.0", or the user's own.
        parameter_names: as in ``model.named_parameters()``, in that order; trainable ones only.
        numel: their number of elements.
        kind: "block", or with granularity "module" what it is: units.py, [Note: Units].
        layer: the path of the repeated layer that it is a part of; None: it is no part of one.
    """

    index: int
    name: str
    parameter_names: tuple[str, ...]
    numel: int
    kind: Kind = "block"
    layer: str | None = None

    @property
    def is_eligible(self) -> bool:
        """Whether it is in the lottery unless a setting takes it out."""
        return self.kind in ("block", "matrix")


def find_blocks(model: nn.Module, overrides: Mapping[str, Sequence[str]] | None = None) -> tuple[Block, ...]:
    """Return the model's blocks in order: each trainable parameter is in exactly one, frozen ones are in no block.

    A parameter with several names (a tied head) counts once, under its first. Blocks without trainable
    parameters are left out. Works on any device, meta included, and where ZeRO-3 has partitioned the parameters.
    [Note: how blocks are found] has the rule.

    Args:
        overrides: block name -> regular expressions that match whole parameter names; replaces the rule.

    Raises BlockError if nothing is trainable or repeated, and where overrides leave a trainable parameter
    in no block or put it in two.
    """
    trainable = {name: numel(p) for name, p in model.named_parameters() if p.requires_grad and numel(p) > 0}
    if not trainable:
        raise BlockError(
            f"{type(model).__name__} has no trainable parameters. Set requires_grad=True on what is to be"
            " trained before training starts."
        )
    divided = _Division(model).names() if overrides is None else _by_overrides(model, trainable, overrides)
    blocks: list[Block] = []
    for block, names in divided.items():
        claimed = set(names)
        parameters = tuple(name for name in trainable if name in claimed)
        if parameters:
            blocks.append(Block(len(blocks), block, parameters, sum(trainable[name] for name in parameters)))
    return tuple(blocks)


def numel(parameter: nn.Parameter) -> int:
    """Return the elements of the whole parameter, also if ZeRO-3 (zero.Init) has left an empty tensor there."""
    return getattr(parameter, "ds_numel", parameter.numel())


def repeated_layers(model: nn.Module) -> list[nn.Module]:
    """Return the model's repeated layers in model order; empty if nothing repeats. [Note: how blocks are found], 1."""
    layers = _layers(model)
    return [module for module in model.modules() if id(module) in layers]


def block_names(blocks: Sequence[Block]) -> tuple[str, ...]:
    """Return the blocks' names, in order."""
    return tuple(block.name for block in blocks)


def shown_names(blocks: Sequence[Block]) -> str:
    """Return the blocks' names, quoted, for a message; units of the layers by `pattern_of`."""
    return quoted(dict.fromkeys(map(pattern_of, blocks)))


def pattern_of(block: Block) -> str:
    """Return the block's name; of a unit of a layer the pattern that also matches its likes in the other layers."""
    return block.name if block.layer is None else re.sub(r"\.\d+(?=\.|$)", ".*", block.name)


def resolve_names(blocks: Sequence[Block], names: Iterable[str], setting: str) -> tuple[int, ...]:
    """Return the indices of the named blocks, ascending and without repeats.

    Raises ConfigError for a name that no block has, naming ``setting``, the field that has it.
    """
    index_of = {block.name: block.index for block in blocks}
    for name in names:
        if name not in index_of:
            raise ConfigError(
                f'{SECTION}.{setting} names "{name}", which is not a block of this model.'
                f"{did_you_mean(name, index_of)} Its blocks: {shown_names(blocks)}."
            )
    return tuple(sorted({index_of[name] for name in names}))


class _Division:
    """All parameters of a model, divided by [Note: how blocks are found]."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = _layers(model)
        if not self._layers:
            raise BlockError(
                f"{type(model).__name__} has no repeated layers: no ModuleList or Sequential in it holds two"
                f" modules of one class. Name its blocks with {SECTION}.blocks, a map from block name to"
                " regular expressions over parameter names."
            )
        self._source = _call_if_present(model, "get_input_embeddings")
        self._embeddings = self._find_embeddings()
        self._towers = {id(trunk) for trunk in self._outside_layers(model) if self._is_tower(trunk)}
        self._first_name = {id(p): name for name, p in model.named_parameters()}
        self._claims: dict[str, list[str]] = {EMBEDDING: []}
        self._claimed: set[int] = set()

    def names(self) -> dict[str, list[str]]:
        """Return block name -> first names of its parameters, blocks in the model's order."""
        self._claim(EMBEDDING, self._embedding_parameters())
        output = _call_if_present(self._model, "get_output_embeddings")
        if output is not None:
            self._claim(HEAD, output.parameters())
        self._walk(self._model, "")
        if HEAD in self._claims:
            self._claims[HEAD] = self._claims.pop(HEAD)
        return self._claims

    def _claim(self, block: str, parameters: Iterable[nn.Parameter]) -> None:
        names = self._claims.setdefault(block, [])
        for p in parameters:
            if id(p) not in self._claimed:
                self._claimed.add(id(p))
                names.append(self._first_name[id(p)])

    def _embedding_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of embeddings outside towers, and all other parameters of modules tied to them."""
        in_towers = {id(m) for trunk in self._model.modules() if id(trunk) in self._towers for m in trunk.modules()}
        held = {id(p) for m in self._embeddings if id(m) not in in_towers for p in m.parameters()}
        tied = [m for m in self._outside_layers(self._model) if any(id(p) in held for p in m.parameters(recurse=False))]
        return [p for m in tied for p in m.parameters(recurse=False)]

    def _find_embeddings(self) -> list[nn.Module]:
        return [m for m in self._outside_layers(self._model) if isinstance(m, nn.Embedding) or m is self._source]

    def _is_tower(self, trunk: nn.Module) -> bool:
        """Return whether ``trunk`` has layers, lacks some of the layers, and reads something else than tokens."""
        inside = {id(m) for m in trunk.modules()}
        if not self._layers & inside or self._layers <= inside:
            return False
        outside_layers = list(self._outside_layers(trunk))
        if self._source is not None:
            output = _call_if_present(
                self._model, "get_output_embeddings"
            )  # a second text stack's own may be tied to it
            tokens = {id(p) for m in (self._source, output) if m is not None for p in m.parameters()}
            return not any(id(p) in tokens for m in outside_layers for p in m.parameters(recurse=False))
        return any(isinstance(m, _CONVOLUTIONS) for m in outside_layers) or not self._holds_embedding(trunk)

    def _outside_layers(self, module: nn.Module) -> Iterator[nn.Module]:
        if id(module) in self._layers:
            return
        yield module
        for child in module.children():
            yield from self._outside_layers(child)

    def _walk(self, trunk: nn.Module, path: str) -> None:
        """Claim all that a module with layers holds: embedding, layers, final norm, head."""
        children = list(trunk.named_children())
        stacks = [place for place, (_, child) in enumerate(children) if self._holds_layers(child)]
        whole = self._layers <= {id(m) for m in trunk.modules()}
        own = "" if whole else f"{path}."
        final_norm, head = f"{own}{FINAL_NORM}", f"{own}{HEAD}"
        front = f"{path}.{EMBEDDING}" if id(trunk) in self._towers else EMBEDDING
        self._claim(front, trunk.parameters(recurse=False))
        last: dict[str, list[nn.Module]] = {final_norm: [], head: []}
        for place, (name, child) in enumerate(children):
            child_path = f"{path}.{name}" if path else name
            if id(child) in self._layers:
                self._claim(child_path, child.parameters())
            elif place in stacks:
                self._walk(child, child_path)
            elif self._holds_embedding(child):
                self._claim(front, child.parameters())
            elif place > stacks[-1]:
                last[final_norm if is_norm(child) else head].append(child)
            elif place > stacks[0]:
                self._claim(child_path, child.parameters())
            elif is_norm(child) and "final" in name.lower().split("_"):
                last[final_norm].append(child)
            else:
                self._claim(front, child.parameters())
        for block, modules in last.items():
            for module in modules:
                self._claim(block, module.parameters())

    def _holds_layers(self, module: nn.Module) -> bool:
        return any(id(m) in self._layers for m in module.modules())

    def _holds_embedding(self, module: nn.Module) -> bool:
        return any(m is embedding for m in module.modules() for embedding in self._embeddings)


def _layers(model: nn.Module) -> set[int]:
    """Return the ids of the layers."""
    found = list(_lists(model, ""))
    repeating = [(name, members) for name, members, repeats in found if repeats]
    larger = [(name, members) for name, members in repeating if any(_is_larger(member) for member in members)]
    counted = larger or repeating
    names = {name for name, _ in counted}
    single = [(name, members) for name, members, repeats in found if not repeats and (name in names or not names)]
    if not counted:
        single = _counted_by_config(model, single)
    return {id(member) for _, members in [*counted, *single] for member in members}


def _lists(module: nn.Module, name: str) -> Iterator[tuple[str, list[nn.Module], bool]]:
    """Yield (name, members, whether they repeat) of each outermost list that may be a list of layers."""
    members = _members(module)
    repeats = bool(members)
    if not members and isinstance(module, nn.ModuleList):
        children = [child for child in module.children() if next(child.parameters(), None) is not None]
        members = children if len(children) == 1 and _is_larger(children[0]) else []
        repeating_inside = any(repeats for member in members for _, _, repeats in _lists(member, ""))
        members = [] if repeating_inside else members  # a list of one tower: the layers are in it
    if members:
        yield name, members, repeats
    inside = {id(member) for member in members}
    for child_name, child in module.named_children():
        if id(child) not in inside:
            yield from _lists(child, child_name)


def _is_larger(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _counted_by_config(
    model: nn.Module, single: list[tuple[str, list[nn.Module]]]
) -> list[tuple[str, list[nn.Module]]]:
    """Return the lists of one member that are layers, for a model in which nothing repeats.

    The config's number of layers decides: if it has one, each list is a layer; above 1, one module stands for all.
    """
    number = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    if not isinstance(number, int) or number < 1 or not single:
        return []
    if number > 1 and os.environ.get("RANK", "0") == "0":
        _LOGGER.warning(
            "%s has %d layers that share one module's parameters, so they are selected together: one block.",
            type(model).__name__,
            number,
        )
    return single


def _members(module: nn.Module) -> list[nn.Module]:
    """Return a ModuleList's modules if two share a class, or those modules of a Sequential whose class repeats."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return []
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    counts = Counter(type(child) for child in children)
    if isinstance(module, nn.ModuleList):
        return children if max(counts.values(), default=0) > 1 else []
    return [child for child in children if counts[type(child)] > 1]


def is_norm(module: nn.Module) -> bool:
    """Return whether all that has parameters in ``module`` is a norm by class name (not "PreLayerNormHead")."""
    holders = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    return all("norm" in type(m).__name__.lower() for m in [module, *holders])


def _call_if_present(model: nn.Module, method: str) -> nn.Module | None:
    """Return the result of transformers' accessor; None for other models or if the model does not implement it."""
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _by_overrides(
    model: nn.Module, trainable: Iterable[str], overrides: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    first_names = {name for name, _ in model.named_parameters()}
    divided: dict[str, list[str]] = {}
    for block, patterns in overrides.items():
        matched: set[str] = set()
        for pattern in patterns:
            found = _matching(pattern, first_names)
            if not found:
                raise BlockError(_matches_nothing(model, block, pattern))
            matched |= found
        divided[block] = sorted(matched)
    claims = Counter(name for names in divided.values() for name in names)
    unclaimed = [name for name in trainable if claims[name] == 0]
    if unclaimed:
        raise BlockError(
            f"{SECTION}.blocks leaves {_listed(unclaimed)} in no block. Add a pattern for each, or freeze it "
            "(requires_grad=False) before training starts."
        )
    twice = [name for name in trainable if claims[name] > 1]
    if twice:
        claimants = quoted(block for block, names in divided.items() if twice[0] in names)
        raise BlockError(
            f"{SECTION}.blocks puts {_listed(twice)} in two blocks or more (the first in {claimants}). Narrow"
            " the patterns; each must match whole parameter names."
        )
    return divided


def _matching(pattern: str, names: Iterable[str]) -> set[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise BlockError(f'{SECTION}.blocks has "{pattern}", which is not a regular expression: {error}.') from None
    return {name for name in names if compiled.fullmatch(name)}


def _matches_nothing(model: nn.Module, block: str, pattern: str) -> str:
    message = f'{SECTION}.blocks["{block}"] has the pattern "{pattern}", which matches no parameter of this model.'
    first_name = {id(p): name for name, p in model.named_parameters()}
    aliases = {name: first_name[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    for name in sorted(_matching(pattern, aliases)):
        return f'{message} "{name}" is tied to "{aliases[name]}": claim it under that name.'
    return f'{message} Patterns match whole names, such as "{next(iter(aliases))}".'


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} trainable parameter{'s' if len(names) > 1 else ''} ({quoted(names[:_LISTED])}{more})"
