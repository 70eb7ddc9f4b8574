from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_ops import find_gradient, reduce_rows
from tests.fused_ops.errors import assert_within_plain_error
from tests.support.device import DEVICE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fused"),
    # Of the interpreter, for padding that is huge and logits that are no numbers.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def losses_and_gradient(logits: Tensor, labels: Tensor, grad_loss: Tensor, num_columns: int, **options: bool):
    columns = {"num_columns": num_columns, "first_column": 0}
    largest, total, label_logit = reduce_rows(logits, labels, **columns)
    losses = total.log() - (label_logit - largest)
    options.setdefault("overwrite", False)
    return losses, find_gradient(logits, labels, largest, total, grad_loss, **columns, **options)


def plain_losses_and_gradient(logits: Tensor, labels: Tensor, grad_loss: Tensor, num_columns: int):
    logits = logits.detach().clone().requires_grad_()
    losses = F.cross_entropy(logits[:, :num_columns], labels, reduction="none")
    losses.backward(grad_loss.to(losses.dtype))
    return losses.detach(), logits.grad


def draw(rows: int, num_columns: int, padded: int, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    """Logits whose padding must not count, labels at both ends among them, and a gradient of the losses."""
    logits = scale * torch.randn(rows, padded)
    logits[:, num_columns:] = 1e4
    labels = torch.randint(num_columns, (rows,))
    labels[0], labels[-1] = 0, num_columns - 1
    return [logits.to(DEVICE, dtype), labels.to(DEVICE), torch.randn(rows, device=DEVICE)]


@pytest.mark.parametrize(
    ("rows", "num_columns", "padded"), [(9, 1025, 1025), (3, 50_257, 50_304), (33, 97, 128), (5, 1, 8), (1, 2048, 2048)]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_error_is_at_most_twice_that_of_pytorch(rows, num_columns, padded, dtype, scale):
    logits, labels, grad_loss = draw(rows, num_columns, padded, dtype, scale)
    results = losses_and_gradient(logits, labels, grad_loss, num_columns)
    assert [x.dtype for x in results] == [torch.float32, dtype]
    assert not results[1][:, num_columns:].any(), "padding has a gradient"
    if num_columns == 1:
        assert not any(x.any() for x in results)
        return
    plain = plain_losses_and_gradient(logits, labels, grad_loss, num_columns)
    exact = plain_losses_and_gradient(logits.double(), labels, grad_loss.double(), num_columns)
    assert_within_plain_error(results, plain, exact, f"{dtype}, {num_columns} columns, scale {scale}")


@pytest.mark.parametrize("view", ["part of wider rows", "every second row", "columns outermost"])
def test_strided_rows_and_labels_are_the_same_to_the_bit(view):
    logits, labels, grad_loss = draw(34, 300, 304, torch.bfloat16)
    strided = {
        "part of wider rows": lambda: F.pad(logits, (0, 13))[:, :304],
        "every second row": lambda: logits.repeat_interleave(2, 0)[::2],
        "columns outermost": lambda: logits.T.contiguous().T,
    }[view]()
    assert not strided.is_contiguous()
    labels_strided = labels.repeat_interleave(2)[::2]
    expected = losses_and_gradient(logits, labels, grad_loss, 300)
    results = losses_and_gradient(strided, labels_strided, grad_loss.repeat_interleave(2)[::2], 300)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
    overwritten = losses_and_gradient(strided, labels, grad_loss, 300, overwrite=True)[1]
    assert torch.equal(overwritten, expected[1])


def test_rows_more_than_2_to_the_31_elements_apart():
    apart = 2**31 + 16
    logits, labels, grad_loss = draw(2, 60, 64, torch.bfloat16)
    # Of 4 GiB two rows are touched: on a CPU the rest is never in memory.
    far = torch.empty(apart + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((2, 64), (apart, 1))
    far.copy_(logits)
    expected = losses_and_gradient(logits, labels, grad_loss, 60)
    results = losses_and_gradient(far, labels, grad_loss, 60, overwrite=True)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
    assert torch.equal(far, expected[1])


def test_overwriting_writes_the_gradient_over_the_logits_and_tells_autograd():
    logits, labels, grad_loss = draw(9, 100, 112, torch.float32)
    expected = losses_and_gradient(logits, labels, grad_loss, 100)[1]
    before = logits._version
    gradient = losses_and_gradient(logits, labels, grad_loss, 100, overwrite=True)[1]
    assert gradient.data_ptr() == logits.data_ptr()
    assert torch.equal(logits, expected)
    assert logits._version > before


def test_a_part_without_columns_and_labels_elsewhere():
    logits, labels, _ = draw(9, 100, 112, torch.float32)
    largest, total, label_logit = reduce_rows(logits, labels, num_columns=0, first_column=0)
    assert largest.isfinite().all()
    assert not total.any()
    assert not label_logit.any()
    # Columns 200 to 299: a label is one of these, or none here.
    labels = torch.tensor([199, 200, 299, 300, -100, -1, 5, 250, 10**12], device=DEVICE)
    label_logit = reduce_rows(logits, labels, num_columns=100, first_column=200)[2]
    expected = [0.0, logits[1, 0].item(), logits[2, 99].item(), 0.0, 0.0, 0.0, 0.0, logits[7, 50].item(), 0.0]
    assert label_logit.tolist() == expected


def test_infinite_logits_get_no_probability_and_what_is_no_number_stays_none():
    logits, labels, grad_loss = draw(4, 100, 112, torch.float32)
    labels[:] = 3
    logits[0, 50:] = -torch.inf
    logits[1, 7] = torch.nan
    logits[2] = -torch.inf
    logits[3, 8] = torch.inf
    losses, gradient = losses_and_gradient(logits, labels, grad_loss, 100)
    expected = F.cross_entropy(logits[:1, :50].double(), labels[:1])
    torch.testing.assert_close(losses[0].double(), expected, rtol=1e-6, atol=0)
    assert not gradient[0, 50:].any()
    assert losses[1:].isnan().all()
