"""State shapes: modules, optimizers, schedulers and what else a training loop keeps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import lr_scheduler as lr
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torchdata.stateful_dataloader import StatefulDataLoader

from rank.shape import Shape, State

COMPILED = partial(torch.compile, backend="eager")
"""Its wrapper is what matters; what the default compiler makes of it takes 40 s."""

STEPS = 3


def _net(seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).to(dtype)


def _train(state: State) -> None:
    """One step; uses whatever the state has."""
    model, optimizer = state["model"], state["optimizer"]
    dtype = next(model.parameters()).dtype
    batch = torch.linspace(-1, 1, 20, dtype=torch.float32).view(5, 4).to(dtype)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(batch).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    loss = optimizer.step(closure)
    if "scheduler" in state:
        plateau = isinstance(state["scheduler"], lr.ReduceLROnPlateau)
        state["scheduler"].step(*([loss.item()] if plateau else []))
    if "ema" in state:
        state["ema"].update_parameters(model)


def _optimizer(
    name: str,
    build: Callable[..., Any],
    *,
    steps: int = STEPS,
    net: Callable[[int], nn.Module] = _net,
) -> Shape:
    def make(seed: int) -> State:
        model = net(seed)
        state: State = {"model": model, "optimizer": build(model.parameters())}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(steps if seed == 1 else 0):  # the twin is fresh
                _train(state)
        return state

    return Shape("optimizer", name, make, advance=_train)


def _matrices(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False))


def _groups(params: Iterator[nn.Parameter]) -> optim.Optimizer:
    one, *rest = params
    groups = [{"params": [one], "lr": 0.5}, {"params": rest, "weight_decay": 0.1}, {"params": []}]
    return optim.AdamW(groups, lr=0.01)


def _bf16(seed: int) -> nn.Module:
    return _net(seed, torch.bfloat16)


def _fp32_state(seed: int) -> State:
    """A bfloat16 model whose optimizer state was made float32 by hand, as many do."""
    model = _bf16(seed)
    optimizer = optim.AdamW(model.parameters(), foreach=False)
    state = {"model": model, "optimizer": optimizer}
    if seed == 1:
        _train(state)
        for items in optimizer.state.values():
            items["exp_avg"] = items["exp_avg"].float() + 1e-5
            items["exp_avg_sq"] = items["exp_avg_sq"].double() / 3
    return state


class _SparseNet(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(9, 3, sparse=True)

    def forward(self, batch: Tensor) -> Tensor:
        return self.table((batch * 4 + 4).long())  # type: ignore[no-any-return]


OPTIMIZERS: list[Shape] = [
    _optimizer("SGD", lambda p: optim.SGD(p, lr=0.1)),
    _optimizer("SGD with momentum", lambda p: optim.SGD(p, lr=0.1, momentum=0.9)),
    _optimizer("SGD, Nesterov", lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    _optimizer("SGD with momentum, before the first step",
               lambda p: optim.SGD(p, lr=0.1, momentum=0.9), steps=0),
    _optimizer("Adam", optim.Adam),
    _optimizer("Adam, AMSGrad", lambda p: optim.Adam(p, amsgrad=True)),
    _optimizer("Adam, foreach", lambda p: optim.Adam(p, foreach=True)),
    _optimizer("Adam, fused", lambda p: optim.Adam(p, fused=True)),
    _optimizer("Adam, lr is a tensor", lambda p: optim.Adam(p, lr=torch.tensor(0.01))),
    _optimizer("AdamW", optim.AdamW),
    _optimizer("AdamW, before the first step", optim.AdamW, steps=0),
    _optimizer("AdamW, groups (one empty)", _groups),
    _optimizer("AdamW of a bfloat16 model", optim.AdamW, net=_bf16),
    Shape("optimizer", "AdamW, float32 and float64 state of bfloat16", _fp32_state),
    _optimizer("NAdam", optim.NAdam),
    _optimizer("RAdam", optim.RAdam),
    _optimizer("Adamax", optim.Adamax),
    _optimizer("Adadelta", optim.Adadelta),
    _optimizer("Adagrad", optim.Adagrad),
    _optimizer("Adagrad, before the first step", optim.Adagrad, steps=0),
    _optimizer("Adafactor", optim.Adafactor),
    _optimizer("ASGD", optim.ASGD),
    _optimizer("RMSprop", optim.RMSprop),
    _optimizer("RMSprop, centered with momentum",
               lambda p: optim.RMSprop(p, centered=True, momentum=0.9)),
    _optimizer("Rprop", optim.Rprop),
    _optimizer("LBFGS", lambda p: optim.LBFGS(p, history_size=3, max_iter=4)),
    _optimizer("Muon", optim.Muon, net=_matrices),
    _optimizer("SparseAdam", lambda p: optim.SparseAdam(list(p)), net=_SparseNet),
]  # fmt: skip


def _scheduler(name: str, build: Callable[[Any], Any]) -> Shape:
    def make(seed: int) -> State:
        model = _net(seed)
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        state = {"model": model, "optimizer": optimizer, "scheduler": build(optimizer)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(STEPS if seed == 1 else 0):
                _train(state)
        return state

    return Shape("scheduler", name, make, advance=_train)


class _Warmup:
    def __init__(self) -> None:
        self.steps = 7

    def __call__(self, epoch: int) -> float:
        return min(1.0, epoch / self.steps)


SCHEDULERS = [
    _scheduler("StepLR", lambda o: lr.StepLR(o, 2)),
    _scheduler("MultiStepLR", lambda o: lr.MultiStepLR(o, [1, 2, 5])),
    _scheduler("ConstantLR", lr.ConstantLR),
    _scheduler("LinearLR", lr.LinearLR),
    _scheduler("ExponentialLR", lambda o: lr.ExponentialLR(o, 0.9)),
    _scheduler("PolynomialLR", lambda o: lr.PolynomialLR(o, 9)),
    _scheduler("CosineAnnealingLR", lambda o: lr.CosineAnnealingLR(o, 9)),
    _scheduler("CosineAnnealingWarmRestarts", lambda o: lr.CosineAnnealingWarmRestarts(o, 2)),
    _scheduler("CyclicLR", lambda o: lr.CyclicLR(o, 0.01, 0.1, 2)),
    _scheduler("OneCycleLR", lambda o: lr.OneCycleLR(o, 0.2, 20)),
    _scheduler("ReduceLROnPlateau", lambda o: lr.ReduceLROnPlateau(o, patience=0)),
    _scheduler("SequentialLR", lambda o: lr.SequentialLR(
        o, [lr.LinearLR(o), lr.ExponentialLR(o, 0.9)], [2])),
    _scheduler("ChainedScheduler", lambda o: lr.ChainedScheduler(
        [lr.ConstantLR(o), lr.ExponentialLR(o, 0.9)])),
    _scheduler("LambdaLR (torch leaves the lambda out)",
               lambda o: lr.LambdaLR(o, lambda epoch: 1 / (epoch + 1))),
    _scheduler("LambdaLR of an object", lambda o: lr.LambdaLR(o, _Warmup())),
    _scheduler("MultiplicativeLR", lambda o: lr.MultiplicativeLR(o, lambda _: 0.9)),
    _scheduler("SWALR", lambda o: SWALR(o, 0.05)),
]  # fmt: skip


class _Extra(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), float(seed)))
        self.register_buffer("mask", torch.arange(3) + seed)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.register_buffer("nothing", None)
        self.note = {"seed": seed, "t": torch.full((2,), float(seed))}

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


class _Holder:
    """An object whose state_dict gives another object as it is."""

    def __init__(self, held: Any) -> None:
        self.epoch, self.held = 1, held

    def state_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _Wrapped(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.module = _net(seed)

    def forward(self, batch: Tensor) -> Tensor:
        return self.module(batch)  # type: ignore[no-any-return]


def _trained(seed: int, wrap: Callable[[nn.Module], Any], **more: Any) -> State:
    net = _net(seed)
    model = wrap(net)
    state: State = {"model": model, "optimizer": optim.AdamW(model.parameters()), **more}
    if seed == 1:
        _train(state)
    return state


def _ema(seed: int, **options: Any) -> State:
    net = _net(seed)
    state: State = {"model": net, "optimizer": optim.AdamW(net.parameters())}
    state["ema"] = AveragedModel(net, **options)
    for _ in range(STEPS if seed == 1 else 0):
        _train(state)
    return state


def _frozen(seed: int) -> State:
    net = _net(seed)
    net[0].requires_grad_(requires_grad=False)
    trained = [param for param in net.parameters() if param.requires_grad]
    state: State = {"model": net, "optimizer": optim.AdamW(trained)}
    if seed == 1:
        _train(state)
    return state


def _scaler(seed: int) -> State:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**seed)
    scaler.scale(torch.ones(1))
    scaler.update(3.0 * seed)
    return {"scaler": scaler}


def _loader(seed: int, batches: int) -> State:
    torch.manual_seed(seed)
    loader: Any = StatefulDataLoader(range(20), batch_size=4, shuffle=True)
    if seed == 1:
        for at, _ in enumerate(loader):
            if at + 1 == batches:
                break
    return {"loader": loader}


def _accumulating(seed: int) -> State:
    net = _net(seed)
    grads = {name: torch.full_like(p, seed) for name, p in net.named_parameters()}
    history = {"clip": [0.5, 0.1], "losses": [float(at) for at in range(seed * 10)]}
    return {"model": net, "grads": grads, "micro_step": seed, "history": history}


def _holds_optimizer(seed: int) -> State:
    net = _net(seed)
    return {"model": net, "x": [_Holder({"of": optim.AdamW(net.parameters())})]}


def _metadata_of_old(seed: int) -> State:
    return {"weights": _net(seed).state_dict(), "list": [_net(seed).state_dict()]}


def _nested(seed: int) -> State:
    nets = {"a": _net(seed), "b": [_net(seed + 10), {"c": _net(seed + 20)}]}
    return {"nets": nets, "step": seed}


def _lbfgs_tensors(seed: int) -> State:
    return {"queue": {"ids": torch.arange(4) + seed, "ptr": torch.tensor(seed)}}


TRAINING = [
    *OPTIMIZERS,
    *SCHEDULERS,
    Shape("trainer", "module with extra state and buffers", lambda s: {"m": _Extra(s)}),
    Shape("trainer", "module without parameters", lambda _: {"m": nn.ReLU()}),
    Shape("trainer", "state_dict with _metadata, as plain state", _metadata_of_old),
    Shape("trainer", "modules in containers", _nested),
    Shape("trainer", "frozen parameters", _frozen, advance=_train),
    Shape("trainer", "torch.compile wrapper", lambda s: _trained(s, COMPILED)),
    Shape("trainer", "wrapper with `module.`", lambda s: _trained(
        s, lambda _: _Wrapped(s)), advance=_train),
    Shape("trainer", "EMA (AveragedModel)", lambda s: _ema(
        s, multi_avg_fn=get_ema_multi_avg_fn(0.9)), advance=_train),
    Shape("trainer", "SWA (AveragedModel with buffers)", lambda s: _ema(s, use_buffers=True),
          advance=_train),
    Shape("trainer", "GradScaler", _scaler),
    Shape("trainer", "accumulated gradients, histories", _accumulating),
    Shape("trainer", "queue with a pointer (MoCo)", _lbfgs_tensors),
    Shape("trainer", "object within the state_dict of another", lambda s: {
        "x": _Holder(_scaler(s)["scaler"])}, refused="x/held"),
    Shape("trainer", "optimizer within the state_dict of an object", _holds_optimizer,
          refused="x/0/held/of"),
    Shape("data", "StatefulDataLoader in the middle", lambda s: _loader(s, 2)),
    Shape("data", "StatefulDataLoader at the end", lambda s: _loader(s, 5)),
]  # fmt: skip
