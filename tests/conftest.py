"""What the tests share: the files of the project, and a copy of them to try things on."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def project_files() -> list[Path]:
    "Every file that is committed or would be, relative to the root"
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', '-z'], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout
    names = sorted(filter(None, listed.split('\0')))
    return [Path(n) for n in names if (ROOT/n).exists() or (ROOT/n).is_symlink()]


@pytest.fixture(scope='session')
def root() -> Path:
    "The project's root"
    return ROOT


@pytest.fixture(scope='session')
def files() -> list[Path]:
    "Every file of the project, relative to the root"
    if shutil.which('git') is None or not (ROOT/'.git').exists():
        pytest.skip('needs git and a clone, to know which files belong to the project')
    return project_files()


@pytest.fixture
def clone(files:list[Path], tmp_path:Path) -> Path:
    "A copy of the project's files that a test may change"
    target = tmp_path/'clone'
    for name in files:
        (target/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, target/name, follow_symlinks=False)
    return target


@pytest.fixture(scope='session')
def shared() -> Path:
    "Real files for development, which lie beside a clone on some machines and on most do not"
    path = ROOT.parent/'shared'/'data'
    if not path.is_dir(): pytest.skip('../shared/data is not here')
    return path


@pytest.fixture(autouse=True)
def one_thread() -> None:
    "Parity is checked with one thread: with two, some kernels were seen to differ by 1e-4"
    if 'torch' in sys.modules: sys.modules['torch'].set_num_threads(1)
