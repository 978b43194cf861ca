"""Export the weights that a run was scored with: ONNX, torch.export or safetensors."""

import importlib.util
from pathlib import Path

from cifar_lab import cli
from cifar_lab.errors import UsageError, missing_extra
from cifar_lab.runs.files import write_text
from cifar_lab.runs.run_dir import RunDir

# The packages that a format needs besides torch; all of them come with the extra `export`.
PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "pt2": (),
    "safetensors": ("safetensors",),
}


@cli.command
def main(argv: list[str]) -> int:
    """Run `python -m cifar_lab.export RUN_DIR --format FORMAT`."""
    parser = cli.Parser("export", __doc__)
    parser.add("run_dir", "a finished run's folder", type=cli.path)
    parser.add_argument("--format", required=True, choices=PACKAGES, dest="kind")
    where = "the file to write (RUN_DIR/model.onnx); for safetensors the folder"
    parser.add("--output", where, type=cli.path, metavar="FILE")
    parser.add_flag("--overwrite", "replace files that are there")
    arguments = parser.parse_args(argv)
    for name in PACKAGES[arguments.kind]:
        if importlib.util.find_spec(name) is None:  # not imported yet
            raise missing_extra(f"export --format {arguments.kind}", name, "export")

    from cifar_lab.exports.formats import export
    from cifar_lab.exports.model_card import model_card

    run = RunDir(arguments.run_dir)
    if run.status != "finished":
        raise UsageError(
            f"{run.path.name} is {run.status}; finish it first: "
            f"python -m cifar_lab.train {run.path}"
        )
    files = _files(run.path, arguments.kind, arguments.output)
    for path in files:
        cli.check_output("--output", path, creates_folder=True)
        if path.exists() and not arguments.overwrite:
            raise UsageError(f"{path} is in the way; --overwrite replaces it, --output renames")
    output, expected, largest = export(run, arguments.kind, files[0])
    size = files[0].stat().st_size / 1e6
    print(f"exported: {files[0]} ({size:.1f} MB); input: images in [0, 1], output: {output}")
    print(
        f"checked on {len(expected.indices):,} test images: the largest difference from "
        f"{expected.source} is {largest:.2g}"
    )
    if expected.note is not None:
        print(f"note: {expected.note}")
    for card in files[1:]:
        write_text(card, model_card(run, output))
        print(f"model card: {card}")
    return 0


def _files(run: Path, kind: str, output: Path | None) -> list[Path]:
    """Return the file of the network, and for safetensors its model card."""
    suffix = output.suffix[1:].lower() if output is not None else None
    if suffix in PACKAGES and suffix != kind:
        raise UsageError(f"--output {output} is wrong: that is no name for {kind}")
    if suffix == "safetensors":
        raise UsageError(f"--output {output} is wrong: it is the folder for two files")
    if kind == "safetensors":
        folder = output or run / "safetensors"
        return [folder / "model.safetensors", folder / "README.md"]
    return [output or run / f"model.{kind}"]


if __name__ == "__main__":
    raise SystemExit(main())
