"""The simulated device is as strict and as forgetful as a GPU, and computes what the host computes."""

import copy
import io
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.device.sim_device import NUM_DEVICES


@pytest.fixture(autouse=True)
def as_new() -> Iterator[None]:
    """Start from zero, on the first device."""
    if hasattr(torch, "sim"):
        import sim_device

        sim_device.reset_counts()
    yield
    if hasattr(torch, "sim"):
        torch.accelerator.set_device_index(0)


def counts(device: int) -> dict[str, int]:
    import sim_device

    return sim_device.counts(device)


def on_both(compute: Callable[[str], Tensor]) -> tuple[Tensor, Tensor]:
    """Return what comes out on the host and on a device, from the same seed."""
    torch.manual_seed(3)
    on_host = compute("cpu")
    torch.manual_seed(3)
    return on_host, compute("sim:2").cpu()


def test_torch_knows_it_by_name() -> None:
    assert torch.device("sim:1").type == torch.accelerator.current_accelerator().type == "sim"
    assert torch.get_device_module("sim") is torch.sim
    assert torch.sim.is_available()
    assert torch.sim.device_count() == torch.accelerator.device_count() == NUM_DEVICES
    assert nn.Linear(2, 2).sim(1).weight.is_sim


def test_each_thread_has_a_current_device() -> None:
    seen = []
    torch.accelerator.set_device_index(2)
    thread = threading.Thread(target=lambda: seen.append(torch.accelerator.current_device_index()))
    thread.start()
    thread.join()
    assert seen == [0]
    assert torch.sim.current_device() == 2
    assert torch.ones(1, device="sim").device == torch.device("sim:2")
    with torch.sim.device(1):
        assert torch.ones(1, device="sim").device == torch.device("sim:1")


def test_there_is_no_more_than_there_is() -> None:
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(1, device=f"sim:{NUM_DEVICES}")


@pytest.mark.parametrize("other", ["cpu", "sim:0"])
@pytest.mark.parametrize(
    "operation",
    [
        torch.add,
        torch.matmul,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: a.add_(b),
        lambda a, b: b.add_(a),
        lambda a, b: a.gather(0, b.long()),
        lambda a, b: F.linear(a, a, b[0]),
        lambda a, b: F.embedding(b.long(), a),
        lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: torch.add(a, a, out=b),
    ],
)
def test_devices_do_not_mix(operation: Callable[[Tensor, Tensor], Tensor], other: str) -> None:
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        operation(torch.ones(3, 3, device="sim:1"), torch.zeros(3, 3, device=other))


def test_a_number_or_an_index_of_the_host_may_stand_beside() -> None:
    ours = torch.ones(3, 3, device="sim:1")
    number, index = torch.tensor(2.0), torch.tensor([0, 2])
    for result in (ours + number, ours.masked_fill(ours > 0, number), ours.eq_(number), ours // 2, ours[index]):
        assert result.device == ours.device
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.ones(3) + torch.tensor(2.0, device="sim:1")


def test_the_host_sees_values_by_copies_only() -> None:
    ours = torch.arange(3.0, device="sim:1")
    with pytest.raises(TypeError, match="can't convert sim:1 device type tensor to numpy"):
        ours.numpy()
    assert ours.tolist() == [0, 1, 2]
    assert ours.sum().item() == 3
    assert counts(1)["to_host"] == 3 * 4 + 4


@pytest.mark.parametrize(
    "draw",
    [
        lambda device: torch.randn(50, device=device),
        lambda device: torch.rand(50, device=device),
        lambda device: torch.randint(9, (50,), device=device),
        lambda device: torch.randperm(50, device=device),
        lambda device: torch.bernoulli(torch.full((50,), 0.3, device=device)),
        lambda device: torch.multinomial(torch.ones(50, device=device), 9),
        lambda device: F.dropout(torch.ones(50, device=device), 0.3),
        lambda device: F.alpha_dropout(torch.ones(50, device=device), 0.3),
    ],
)
def test_random_numbers_are_those_of_the_same_seed_on_the_host(draw: Callable[[str], Tensor]) -> None:
    on_host, on_device = on_both(draw)
    assert torch.equal(on_host, on_device)


def test_each_device_draws_from_a_generator_of_its_own() -> None:
    torch.sim.manual_seed_all(1)
    before, host = torch.sim.get_rng_state(0), torch.get_rng_state()
    first = F.dropout(torch.ones(50, device="sim:1"))
    assert torch.equal(torch.sim.get_rng_state(0), before)
    assert torch.equal(torch.get_rng_state(), host)
    torch.sim.set_rng_state(before, "sim:1")
    assert torch.equal(F.dropout(torch.ones(50, device="sim:1")), first)
    with torch.sim.device(1):
        torch.sim.manual_seed(1)
    with torch.random.fork_rng([1], device_type="sim"):
        F.dropout(torch.ones(50, device="sim:1"))
    assert torch.equal(F.dropout(torch.ones(50, device="sim:1")), first)


def test_a_generator_must_be_of_the_device() -> None:
    seeded = [torch.Generator("sim:1").manual_seed(1) for _ in range(2)]
    draws = [torch.rand(3, device="sim:1", generator=generator) for generator in seeded]
    assert torch.equal(*draws)
    with pytest.raises(RuntimeError, match="Expected a 'sim' device type for generator but found 'cpu'"):
        torch.rand(3, device="sim:1", generator=torch.Generator())


LAYERS = {
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Dropout(0.3)), (3, 4)),
    "conv": (lambda: nn.Conv2d(2, 3, 3), (2, 2, 6, 6)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 4, 3, groups=2, bias=False), (2, 2, 6)),
    "batch norm": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (5, 4)),
    "lstm": (lambda: nn.LSTM(4, 5, batch_first=True), (2, 3, 4)),
    "gru": (lambda: nn.GRU(4, 5, bias=False), (2, 3, 4)),
    "transformer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 3, 8)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_compute_and_learn_what_they_do_on_the_host(layer: str) -> None:
    make, shape = LAYERS[layer]

    def train(device: str) -> Tensor:
        module, batch = make(), torch.randn(shape)
        module, batch = module.to(device), batch.to(device)
        torch.manual_seed(1)  # the layers were made on the host, which drew for that
        output = module(batch)
        output = output[0] if isinstance(output, tuple) else output
        output.square().sum().backward()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
        optimizer.step()
        return torch.cat([output.flatten(), *(parameter.flatten() for parameter in module.parameters())]).detach()

    torch.testing.assert_close(*on_both(train), rtol=1e-5, atol=1e-5)


def test_integers_are_counted() -> None:
    found = torch.histc(torch.tensor([3, 1, 1, 0, 3, 3], device="sim:1"), bins=4, min=0, max=3)
    assert (found.tolist(), found.dtype, found.device) == ([1, 2, 0, 3], torch.int64, torch.device("sim:1"))


def test_autocast_has_a_list_of_its_own() -> None:
    layer, batch = nn.Linear(4, 4).to("sim"), torch.randn(2, 4, device="sim")
    with torch.autocast("sim", torch.bfloat16):
        low = layer(batch)
        assert low.dtype == torch.bfloat16
        assert low.softmax(-1).dtype == torch.float32
        assert torch.cat([low, batch]).dtype == torch.float32
        loss = F.mse_loss(low, batch)
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(batch).dtype == torch.float32


def test_inference_mode_takes_views_of_what_was_made_outside() -> None:
    ours = torch.arange(6.0, device="sim:1", requires_grad=True)
    with torch.inference_mode():
        seen = ours.view(2, 3)[1]
        assert not seen.is_inference()
        assert (seen * 2).is_inference()
        assert seen.tolist() == [3, 4, 5]
    with torch.no_grad():
        ours.view(2, 3)[1].zero_()
    assert ours.tolist() == [0, 1, 2, 0, 0, 0]


def test_checkpointing_draws_the_same_mask_again() -> None:
    batch = torch.ones(50, device="sim:1", requires_grad=True)
    output = checkpoint(F.dropout, batch, use_reentrant=False, preserve_rng_state=True)
    output.sum().backward()
    assert torch.equal(batch.grad, output.detach())


@pytest.mark.parametrize(
    ("map_location", "where"), [(None, "sim:1"), ("cpu", "cpu"), ("sim:2", "sim:2"), ({"sim:1": "sim:3"}, "sim:3")]
)
def test_saved_tensors_load_where_they_should(map_location: object, where: str) -> None:
    file = io.BytesIO()
    torch.save(torch.arange(3.0, device="sim:1"), file)
    file.seek(0)
    loaded = torch.load(file, map_location=map_location)
    assert loaded.device == torch.device(where)
    assert loaded.tolist() == [0, 1, 2]


def test_copies_stay_on_the_device() -> None:
    layer = nn.Linear(2, 2).to("sim:1")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.weight.device == layer.weight.device
        assert torch.equal(other.weight, layer.weight)


def test_parameters_stay_what_they_are_when_they_move() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layers[1].weight = weight = layers[0].weight
    layers.to("sim:1")
    assert layers[0].weight is layers[1].weight is weight
    weight.data = torch.ones(2, 2)
    assert weight.device.type == "cpu"
    weight.data = torch.ones(2, 2, device="sim:2")
    assert weight.device == torch.device("sim:2")
    assert layers.cpu()[0].weight is weight


def test_memory_is_counted_for_each_device() -> None:
    before = torch.sim.memory_allocated(3)
    torch.sim.reset_peak_memory_stats(3)
    kept = torch.ones(1000, device="sim:3")
    freed = torch.ones(1000, device="sim:3")
    del freed
    assert torch.sim.memory_allocated("sim:3") - before == kept.nbytes
    assert torch.sim.max_memory_allocated(3) - before >= 2 * kept.nbytes
    del kept
    assert torch.sim.memory_allocated(3) == before


def test_memory_ends() -> None:
    import sim_device

    sim_device.limit_memory(3, 1000)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.ones(1000, device="sim:3")
    finally:
        sim_device.limit_memory(3, 1 << 40)


def test_bytes_and_waits_are_counted() -> None:
    ours = torch.ones(1000).to("sim:1")
    assert (counts(1)["to_device"], counts(1)["syncs"]) == (4000, 1)
    ours.mul_(2)
    assert counts(1)["syncs"] == 1
    ours.nonzero()
    ours.cpu()
    torch.accelerator.synchronize("sim:1")
    assert (counts(1)["to_host"], counts(1)["syncs"]) == (4000, 4)
    ours.to("sim:2")
    assert (counts(2)["between"], counts(2)["syncs"]) == (4000, 0)


def test_what_is_not_waited_for_is_not_there() -> None:
    ours, host = torch.ones(4, device="sim"), torch.zeros(4).pin_memory()
    assert host.is_pinned()
    host.copy_(ours, non_blocking=True)
    ours.zero_()  # in the order of the device: after the copy
    assert host.tolist() == [0] * 4
    torch.accelerator.synchronize()
    assert host.tolist() == [1] * 4
    assert ours.to("cpu", non_blocking=True).isnan().all()


def test_what_is_still_to_be_copied_must_be_left_alone() -> None:
    host = torch.ones(4).pin_memory()
    ours = host.to("sim", non_blocking=True)
    host.zero_()
    assert ours.tolist() == [0] * 4
    kept = torch.ones(4)
    ours = kept.to("sim", non_blocking=True)  # not pinned: copied at once
    kept.zero_()
    assert ours.tolist() == [1] * 4


def test_streams_and_events_count() -> None:
    stream, event = torch.Stream("sim:1"), torch.Event("sim:1")
    with stream:
        assert torch.accelerator.current_stream("sim:1") == stream
        event.record()
        torch.ones(1, device="sim:1").record_stream(stream)
    event.synchronize()
    assert event.query()
    counted = counts(1)
    assert (counted["streams"], counted["events"], counted["recorded"], counted["syncs"]) == (1, 1, 1, 1)


def test_a_process_that_this_one_starts_has_it_too() -> None:
    program = "import torch; print(torch.ones(2, device='sim:1').sum().item(), torch.accelerator.current_accelerator())"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["2.0", "sim"]
