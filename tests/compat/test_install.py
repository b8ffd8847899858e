"""install() and installed(): what `import mamba_ssm` finds, and that nothing is left behind."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import threading

import pytest

import fastlvm
from fastlvm import compat

FAKE = "ours = False\n__version__ = '0.0'\n"
BELOW = ("mamba_ssm", "causal_conv1d")
PLACES = {
    "mamba_ssm": ["selective_scan_fn", "mamba_inner_fn", "Mamba", "Mamba2", "MambaLMHeadModel"],
    "mamba_ssm.models.config_mamba": ["MambaConfig"],
    "mamba_ssm.models.mixer_seq_simple": ["MambaConfig", "MambaLMHeadModel", "MixerModel", "create_block"],
    "mamba_ssm.modules.block": ["Block"],
    "mamba_ssm.modules.mamba2": ["Mamba2"],
    "mamba_ssm.modules.mamba_simple": ["Mamba"],
    "mamba_ssm.modules.mlp": ["GatedMLP"],
    "mamba_ssm.ops.selective_scan_interface": [
        "selective_scan_fn",
        "selective_scan_ref",
        "mamba_inner_fn",
        "mamba_inner_ref",
    ],
    "mamba_ssm.ops.triton.layer_norm": ["RMSNorm", "layer_norm_fn", "rms_norm_fn"],
    "mamba_ssm.ops.triton.layernorm_gated": ["LayerNorm", "RMSNorm", "layernorm_fn", "rmsnorm_fn"],
    "mamba_ssm.ops.triton.selective_state_update": ["selective_state_update"],
    "mamba_ssm.ops.triton.ssd_combined": ["mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"],
    "mamba_ssm.utils.generation": [
        "GenerationMixin",
        "InferenceParams",
        "decode",
        "modify_logit_for_repetition_penalty",
        "modify_logits_for_min_p_filtering",
        "modify_logits_for_top_k_filtering",
        "modify_logits_for_top_p_filtering",
        "sample",
    ],
    "mamba_ssm.utils.hf": ["load_config_hf", "load_state_dict_hf"],
    "causal_conv1d": ["causal_conv1d_fn", "causal_conv1d_update"],
    "causal_conv1d.causal_conv1d_interface": ["causal_conv1d_fn", "causal_conv1d_update"],
    "causal_conv1d.causal_conv1d_varlen": ["causal_conv1d_varlen_states"],
}


def _held():
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] in BELOW}


@pytest.fixture(autouse=True)
def as_before():
    modules, path = _held(), list(sys.meta_path)
    yield
    compat.uninstall()
    assert _held() == modules
    assert sys.meta_path == path


@pytest.fixture
def original(tmp_path, monkeypatch):
    """A folder with an original of mamba_ssm in it, which the import system finds."""
    folder = tmp_path / "mamba_ssm"
    (folder / "ops").mkdir(parents=True)
    (folder / "__init__.py").write_text(FAKE)
    (folder / "ops" / "__init__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield folder
    for name in list(_held()):
        del sys.modules[name]


@pytest.mark.parametrize("place", PLACES)
def test_every_module_of_the_originals_gives_fastlvms_names(place):
    home = importlib.import_module(f"fastlvm.compat.{place.split('.')[0]}")
    with compat.installed(force=True):
        assert importlib.util.find_spec(place) is not None
        module = importlib.import_module(place)
        for name in PLACES[place]:
            ours = f"{name}Gated" if (place.endswith("layernorm_gated") and name.endswith("Norm")) else name
            assert getattr(module, name) is getattr(home, ours)


def test_an_import_of_the_package_brings_the_modules_below():
    with compat.installed(force=True):
        import mamba_ssm

        assert mamba_ssm.ops.selective_scan_interface.selective_scan_fn is mamba_ssm.selective_scan_fn
        assert mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined


def test_the_version_tells_the_api_and_whose_code_it_is():
    with compat.installed(force=True):
        for name in BELOW:
            api, _, ours = importlib.import_module(name).__version__.partition("+")
            assert [int(part) for part in api.split(".")] >= [1, 4]
            assert ours == f"fastlvm.{fastlvm.__version__}"
        assert int(sys.modules["mamba_ssm"].__version__[0]) == 2


def test_a_module_that_is_not_here_is_not_found():
    with compat.installed(force=True):
        assert importlib.util.find_spec("mamba_ssm.ops.tilelang") is None
        with pytest.raises(ModuleNotFoundError, match=r"mamba_ssm\.modules\.mha"):
            importlib.import_module("mamba_ssm.modules.mha")


@pytest.mark.skipif(any(map(importlib.util.find_spec, BELOW)), reason="an original is installed")
def test_nothing_is_there_before_install_and_after_uninstall():
    assert compat.install() == ("causal_conv1d", "mamba_ssm")
    assert compat.install() == ("causal_conv1d", "mamba_ssm")
    from mamba_ssm import Mamba

    compat.uninstall()
    compat.uninstall()
    assert not _held()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mamba_ssm")
    assert Mamba(8)  # what was imported goes on


def test_an_original_stays_unless_it_is_to_be_replaced(original):
    import mamba_ssm.ops

    assert "mamba_ssm" not in compat.install()
    assert importlib.import_module("mamba_ssm").ours is False
    assert "mamba_ssm" in compat.install(force=True)
    assert hasattr(importlib.import_module("mamba_ssm"), "Mamba")
    compat.uninstall()
    assert sys.modules["mamba_ssm"] is mamba_ssm
    assert sys.modules["mamba_ssm.ops"] is mamba_ssm.ops
    assert importlib.import_module("mamba_ssm").ours is False


def test_a_folder_without_an_init_is_no_original(tmp_path, monkeypatch):
    (tmp_path / "mamba_ssm").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    if importlib.util.find_spec("mamba_ssm").origin is not None:
        pytest.skip("an original is installed")
    assert "mamba_ssm" in compat.install()


def test_an_import_that_is_blocked_stays_blocked_afterwards(monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with compat.installed() as packages:
        assert "mamba_ssm" in packages
        assert hasattr(importlib.import_module("mamba_ssm"), "Mamba")
    assert sys.modules["mamba_ssm"] is None


def test_a_with_statement_leaves_what_install_did():
    compat.install(force=True)
    with compat.installed(force=True) as packages:
        assert packages == ("causal_conv1d", "mamba_ssm")
    assert importlib.import_module("mamba_ssm").Mamba
    with pytest.raises(RuntimeError, match="inside"), compat.installed(force=True):
        raise RuntimeError("inside")
    assert importlib.import_module("mamba_ssm").Mamba


def test_threads_do_not_take_it_from_each_other():
    failures = []

    def work():
        try:
            for _ in range(20):
                with compat.installed(force=True):
                    assert importlib.import_module("causal_conv1d").causal_conv1d_fn
                    assert importlib.import_module("mamba_ssm.modules.mamba2").Mamba2
        except BaseException as error:
            failures.append(error)

    importlib.import_module("fastlvm.compat.mamba_ssm")
    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_importing_compat_and_installing_imports_no_torch():
    code = (
        "import sys, fastlvm.compat as compat; dir(compat); before = list(sys.meta_path); compat.install(True);"
        "added = len(sys.meta_path) - len(before); print('torch' in sys.modules, 'mamba_ssm' in sys.modules, added)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == ["False", "False", "1"]


def test_an_unknown_name_of_compat_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'mamba_ssn'"):
        compat.mamba_ssn  # noqa: B018
