"""Brings folders from the top of the repository into the wheel; pyproject.toml says all else."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

# Within the package there, where megatron_opd/files/shipped.py finds them.
SHIPPED = ("recipes/**/*.yaml", "slurm/*.yaml", "slurm/submit.py")


class BuildWithShipped(build_py):
    """Builds the package, with the files that lie at the top of the repository."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout itself is imported
            return
        for source, target in self._shipped().items():
            self.mkpath(str(target.parent))
            self.copy_file(str(source), str(target))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        written = [] if self.editable_mode else [str(path) for path in self._shipped().values()]
        return super().get_outputs(include_bytecode) + written

    def _shipped(self) -> dict[Path, Path]:
        """The place in the wheel's package by file."""
        package = Path(self.build_lib) / "megatron_opd"
        files = [file for pattern in SHIPPED for file in Path().glob(pattern)]
        return {file: package / file for file in files}


setup(cmdclass={"build_py": BuildWithShipped})
