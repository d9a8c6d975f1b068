"""Gates on plain torch models: scores and masked gradients against row-by-row autograd in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import reference_gast as twin
import torch
from support import Case, model_blocks, tiny_model
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from ds_agsel.blocks import repeated_layers
from ds_agsel.errors import TrainingError
from ds_agsel.gast_section import GastConfig
from ds_agsel.samples import rows as rows_module
from ds_agsel.samples import scores as scores_module
from ds_agsel.samples.choice import DrawKey, take
from ds_agsel.samples.gate import Gate
from ds_agsel.samples.record import Samples
from ds_agsel.samples.rows import RowChoice
from ds_agsel.samples.scores import Use, against, of_halves, support_of

ROWS, SEED, RANK = 6, 5, 1


@pytest.fixture(autouse=True)
def doubles() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def batch(rows: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(37, (rows, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def blocks_of(model: nn.Module) -> dict[int, list[str]]:
    return dict(enumerate(model_blocks(model).values()))


class Rows:
    """A model with its choice of rows, as a window uses it."""

    def __init__(self, model: Any, **config: Any):
        self.model = model.double()
        self.config, self.record = GastConfig(**config), Samples(10)
        named = dict(model.named_parameters())
        block_of = {id(named[name]): block for block, names in blocks_of(model).items() for name in names}
        self.choice = RowChoice(model, repeated_layers(model), block_of, self.config, SEED, RANK, self.record)

    def gradients(self, data: dict[str, Tensor], active: Any = range(6), micro_steps: int = 1) -> dict[str, Tensor]:
        self.model.zero_grad(set_to_none=True)
        for _ in range(micro_steps):
            self.choice.begin_forward(7, active)
            self.model(**data).loss.backward()
        self.choice.close()
        self.record.commit(7, active)
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}

    def expected(self, data: dict[str, Tensor], active: Any = range(6), micro_step: int = 0) -> dict[str, Tensor]:
        def taken(block: int, scores: Tensor) -> list[int]:
            key = DrawKey(SEED, 7, micro_step, RANK, block)
            found = take(self.config, len(scores), key, None if self.config.draw == "random" else scores, scores.device)
            return list(range(len(scores))) if found is None else found.tolist()

        layers = {block: names for block, names in blocks_of(self.model).items() if block in active and 0 < block < 5}
        return twin.masked_gradient(self.model, data, layers, taken)


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-8, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("tokens", [1, 40])
def test_scores_are_those_of_per_row_gradients_by_torch_func(tokens: int) -> None:
    """By products of tokens where these are few, by the gradient where they are many."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(5, 7, bias=False)
    x, target = torch.randn(5, tokens, 5, generator=generator), torch.randn(5, tokens, 7, generator=generator)

    def loss(parameters: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
        return (functional_call(linear, parameters, (x,)) - target).square().sum() / 2

    parameters = {"weight": linear.weight.detach()}
    per_row = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, target)["weight"]
    dy = (linear(x) - target).detach()
    expected = torch.stack([(g * per_row[2:].mean(0)).sum() for g in per_row[:2]] + [
        (g * per_row[:2].mean(0)).sum() for g in per_row[2:]])  # fmt: skip
    torch.testing.assert_close(of_halves([Use(x, dy)]), expected)
    if tokens > 1:  # one Linear, called twice
        torch.testing.assert_close(of_halves([Use(x[:, :1], dy[:, :1]), Use(x[:, 1:], dy[:, 1:])]), expected)

    support = support_of([Use(x[3:], dy[3:])])
    assert (support.gradient is None) == (tokens == 1)
    torch.testing.assert_close(
        against([Use(x, dy)], support), torch.stack([(g * per_row[3:].mean(0)).sum() for g in per_row])
    )


def test_products_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, dy = torch.randn(6, 2, 5), torch.randn(6, 2, 7)
    whole = of_halves([Use(x, dy)])
    monkeypatch.setattr(scores_module, "_MAX_PRODUCTS", 1)
    torch.testing.assert_close(of_halves([Use(x, dy)]), whole)


def test_fp16_scores_do_not_overflow() -> None:
    x, dy = torch.full((4, 3, 8), 60.0).half(), torch.full((4, 3, 8), 3000.0).half()
    assert of_halves([Use(x, dy)]).isfinite().all()


@pytest.mark.parametrize("checkpointing", [None, "non-reentrant", "reentrant"])
@pytest.mark.parametrize("draw", ["sample", "random", "top"])
def test_masked_gradient_is_that_of_the_twin(draw: str, checkpointing: str | None) -> None:
    """No row's refusal reaches any other parameter: norms, embedding and head take all rows."""
    model: Any = tiny_model(Case())
    rows = Rows(model, draw=draw, select_samples=2)
    expected = rows.expected(batch())
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
        model.train()
    assert_close(rows.gradients(batch()), expected)
    chosen = rows.record.history[0]
    assert sorted(chosen.blocks) == [1, 2, 3, 4]
    assert all(len(chosen.taken(block)[0]) == 2 for block in chosen.blocks)


@pytest.mark.parametrize("checkpointing", ["non-reentrant", "reentrant"])
def test_a_layer_checkpointed_with_its_hooks(checkpointing: str) -> None:
    model = tiny_model(Case(model="net"))
    rows = Rows(model, select_samples=2)
    expected = rows.expected(batch())
    model.checkpointing = checkpointing  # type: ignore[assignment]
    assert_close(rows.gradients(batch()), expected)


def test_only_selected_blocks_are_gated() -> None:
    rows = Rows(tiny_model(Case()), select_samples=2)
    assert_close(rows.gradients(batch(), active=(0, 2, 4)), rows.expected(batch(), active=(0, 2, 4)))
    assert sorted(rows.record.history[0].blocks) == [2, 4]


def test_each_micro_step_draws_anew() -> None:
    rows = Rows(tiny_model(Case()), select_samples=2)
    first, second = rows.expected(batch()), rows.expected(batch(), micro_step=1)
    assert_close(rows.gradients(batch(), micro_steps=2), {name: first[name] + second[name] for name in first})
    taken = rows.record.history[0].taken(2)
    assert sorted(taken) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("gated", [True, False])
def test_all_rows_taken_is_bit_identical_to_plain(monkeypatch: Any, dtype: torch.dtype, gated: bool) -> None:
    monkeypatch.setattr(rows_module, "needs_scores", lambda config, rows: gated)
    model = tiny_model(Case())
    rows = Rows(model, select_samples=ROWS)
    model.to(dtype)
    plain = rows.gradients(batch(), active=())
    for name, gradient in rows.gradients(batch()).items():
        assert torch.equal(gradient, plain[name]), name


def test_autocast_is_bit_identical_to_plain() -> None:
    rows = Rows(tiny_model(Case()), select_samples=ROWS)
    rows.model.float()
    with torch.autocast("cpu", torch.bfloat16):
        plain, gated = rows.gradients(batch(), active=()), rows.gradients(batch())
    for name, gradient in gated.items():
        assert torch.equal(gradient, plain[name]), name


def test_dropouts_random_stream_is_untouched() -> None:
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x

    model = Dropping()
    block_of = {id(p): 0 for p in model.parameters()}
    choice = RowChoice(model, repeated_layers(model), block_of, GastConfig(select_samples=1), 0, 0, Samples(1))
    outputs, states = [], []
    for active in ((), (0,)):
        torch.manual_seed(3)
        choice.begin_forward(0, active)
        output = model(torch.ones(4, 3, 4))
        output.sum().backward()
        outputs.append(output)
        states.append(torch.random.get_rng_state())
        choice.close()
    assert torch.equal(*outputs) and torch.equal(*states)


def test_a_weights_hook_is_called_once() -> None:
    rows = Rows(tiny_model(Case()), select_samples=2)
    calls: list[str] = []
    for name, parameter in rows.model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))
    rows.gradients(batch())
    assert sorted(calls) == sorted(name for name, _ in rows.model.named_parameters())


def test_a_shared_layer_is_scored_over_its_uses() -> None:
    model: Any = tiny_model(Case(model="net"))
    model.layers[2] = model.layers[1]
    rows = Rows(model, select_samples=2)
    data = batch()
    blocks = blocks_of(model)

    def taken(block: int, scores: Tensor) -> list[int]:
        found = take(rows.config, ROWS, DrawKey(SEED, 7, 0, RANK, block), scores, scores.device)
        assert found is not None
        return found.tolist()

    layers = {block: names for block, names in blocks.items() if "layers" in names[0]}
    assert_close(rows.gradients(data, active=tuple(blocks)), twin.masked_gradient(model, data, layers, taken))


def test_rows_that_can_not_be_told_are_refused_by_the_modules_name() -> None:
    model: Any = tiny_model(Case(model="net"))
    rows = Rows(model)
    rows.choice.begin_forward(0, range(6))
    with pytest.raises(TrainingError, match=r"layers\.1\.linear got an input of shape \(4, 5\)"):
        model.layers[1](torch.ones(4, 5))
    model.layers[1](torch.ones(4, 2, 5))
    with pytest.raises(TrainingError, match=r"layers\.2\.linear got 3 rows .* other Linears got 4"):
        model.layers[2](torch.ones(3, 2, 5))


def test_an_output_may_be_changed_in_place() -> None:
    linear = nn.Linear(3, 3)
    layers = nn.ModuleList([nn.Sequential(linear, nn.ReLU(inplace=True)), nn.Sequential(nn.Linear(3, 3))])
    choice = RowChoice(layers, layers, {id(linear.weight): 0}, GastConfig(select_samples=1), 0, 0, Samples(1))
    choice.begin_forward(0, (0,))
    layers[0](torch.ones(4, 2, 3)).sum().backward()
    assert linear.weight.grad is not None


def test_copies_and_pickles_of_the_model_have_their_own_forward() -> None:
    rows = Rows(tiny_model(Case(model="net")), select_samples=2)
    for other in (copy.deepcopy(rows.model), pickle.loads(pickle.dumps(rows.model))):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        rows.choice.begin_forward(0, range(6))
        assert other(**batch()).loss.item() != rows.model(**batch()).loss.item()
        assert Rows(other).choice.blocks == rows.choice.blocks, "which another engine may gate"


def test_evaluation_and_closed_windows_are_not_gated() -> None:
    rows = Rows(tiny_model(Case()), select_samples=2)
    rows.choice.begin_forward(0, range(6))
    with torch.no_grad():
        rows.model(**batch())
    rows.choice.close()
    rows.model(**batch()).loss.backward()
    rows.record.commit(0, range(6))
    assert rows.record.history[0].blocks == {}
    rows.choice.remove()
    assert all("forward" not in module.__dict__ for module in rows.model.modules())


def test_what_backward_holds_is_x_and_dy_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most tokens times the sum of D_in + D_out of the largest block; inputs that Linears share count once."""
    rows, held = Rows(tiny_model(Case())), []

    def of_all_gates() -> int:
        uses = [use for gate in rows.choice._open for of in gate._uses.values() for use in of]
        tensors = [tensor for use in uses for tensor in (use.x, use.dy)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    keep = Gate.keep

    def counting(self: Gate, number: int, use: Use) -> None:
        keep(self, number, use)
        held.append(of_all_gates())

    monkeypatch.setattr(Gate, "keep", counting)
    data = batch()
    rows.gradients(data)
    layer = rows.model.model.layers[0]
    sides = sum(sum(m.weight.shape) for m in layer.modules() if isinstance(m, nn.Linear))
    assert 0 < max(held) <= data["input_ids"].numel() * sides * 8
    assert len(held) == 4 * 7
