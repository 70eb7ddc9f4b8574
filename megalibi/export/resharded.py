"""The certificate of a checkpoint that was written anew for another topology."""

from __future__ import annotations

from pathlib import Path

from megalibi.checkpoint import Checkpoint
from megalibi.export.certificate import (
    CERTIFICATE,
    Certificate,
    TensorRecord,
    check_tensor_finite,
    compare_slopes,
    describe_software,
    hash_tensor,
    write_certificate,
)
from megalibi.export.fp32 import describe_source
from megalibi.export.judge import check_equal
from megalibi.model import model_slopes


def certify_reshard(source: Checkpoint, output: Path, folder: Path) -> None:
    """Read a new checkpoint back and write its ``certificate.json``: weights and optimizer states, tensor by tensor.

    Args:
        source: The checkpoint that was read.
        output: What the folder will be called; errors name it.
        folder: The new checkpoint.

    Raises:
        CheckpointError: A file does not hold what its manifest says.
        FileError: A file may not be read, or the disk does not give back what was written.
    """
    target = Checkpoint.open(folder)
    before, after = source.read_state(), target.read_state()
    records = []
    for name in target.parameters:
        for kind in sorted(after.kinds):
            values = after.read_whole(name, kind)
            check_tensor_finite(f"{kind}/{name}", values)
            hashes = [hash_tensor(before.read_whole(name, kind)), hash_tensor(values)]
            records.append(
                TensorRecord(
                    source=f"{kind}/{name}",
                    target=f"{kind}/{name}",
                    source_sha256=hashes[0],
                    target_sha256=hashes[1],
                    bit_equal=hashes[0] == hashes[1],
                )
            )
    check_equal(records, output)
    models = [side.config.model for side in (source, target)]
    has_slopes = models[0].position_method == "alibi"
    certificate = Certificate(
        versions=describe_software(),
        source=describe_source(source),
        target={"format": "megalibi", "dtype": "float32", **target.manifest.topology},
        tensors=records,
        ties=target.manifest.ties,
        slopes=compare_slopes(*map(model_slopes, models)) if has_slopes else None,
        not_compared="the target is a checkpoint of megalibi with the same bits",
    )
    write_certificate(certificate, folder / CERTIFICATE)
