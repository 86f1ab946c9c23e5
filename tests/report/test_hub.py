import hashlib
import json
import re
import shlex
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from forked import LIBRARIES, MODELS, started
from fresh import ragged
from hub_server import READER, WRITER, HubServer
from huggingface_hub import constants
from sample_report import make_report
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_subprune.cli import app
from hf_subprune.report.hub import PushError, PushOptions, push_command, push_folder
from hf_subprune.report.report import PruneReport

REPO = "user/small"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback which this process talks to as `user`."""
    with HubServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # made once, for the endpoint of that time
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("TMPDIR", str(tmp_path / "staging"))
        monkeypatch.setattr("tempfile.tempdir", None)
        (tmp_path / "staging").mkdir()
        yield server


def make_model(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return BertModel(BertConfig(vocab_size=20, max_position_embeddings=16, **sizes)).eval()


def make_tokenizer():
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


@pytest.fixture(scope="module")
def report():
    return make_report(layers=1, model="")


@pytest.fixture(scope="module")
def saved(tmp_path_factory, report):
    folder = tmp_path_factory.mktemp("saved")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    report.save(folder)
    return folder


@pytest.fixture
def folder(tmp_path, saved):
    """A pruned model that was saved earlier."""
    return Path(shutil.copytree(saved, tmp_path / "saved model"))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What is pushed


def test_everything_goes_into_one_commit(hub, report, tmp_path):
    commit = report.push_to_hub(REPO, make_model(), make_tokenizer(), commit_message="Half the size")
    repo = hub.repos[REPO]
    assert list(repo.messages.values()) == ["initial commit", "Half the size"]
    assert commit.oid == repo.refs["main"]
    files = hub.files(REPO)
    expected = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert expected | {"subprune_report.json", "subprune_report.md", "plots/kept.png"} <= set(files)
    assert files["README.md"].decode().count(f'from_pretrained("{REPO}")') == 2
    assert PruneReport.from_dict(json.loads(files["subprune_report.json"])) == report
    assert list((tmp_path / "staging").iterdir()) == []


def test_a_saved_folder_is_pushed_as_it_is_with_a_card(hub, folder):
    push_folder(folder, REPO, card_data={"license": "mit"})
    files = hub.files(REPO)
    assert {name: data for name, data in files.items() if name != ".gitattributes"} == contents(folder)
    assert "license: mit" in files["README.md"].decode()


def test_where_the_model_lies_on_this_machine_is_not_told(hub, folder):
    path = folder / "subprune_report.json"
    told = {**json.loads(path.read_text()), "model": "/home/jo/models/encoder"}
    path.write_text(json.dumps(told))
    push_folder(folder, REPO)
    assert json.loads(hub.files(REPO)["subprune_report.json"])["model"] == "encoder"
    assert [name for name, data in hub.files(REPO).items() if b"/home/jo" in data] == []
    assert json.loads(path.read_text()) == told


def test_a_card_that_is_there_is_kept(hub, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmine")
    push_folder(folder, REPO)
    assert hub.files(REPO)["README.md"] == b"---\nlicense: mit\n---\nmine"


def test_hidden_files_stay_at_home(hub, folder):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("x")
    (folder / ".env").write_text("x")
    push_folder(folder, REPO)
    assert not any("secret" in name or ".env" in name for name in hub.files(REPO))


def test_pushing_again_replaces_the_weights_and_nothing_else_is_lost(hub, folder):
    push_folder(folder, REPO)
    repo = hub.repos[REPO]
    stale = {"model-00001-of-00002.safetensors": b"1", "model.safetensors.index.json": b"{}", "notes.txt": b"n"}
    repo.commit("main", {**hub.files(REPO), **stale}, "by hand")
    make_model(seed=1).save_pretrained(folder)
    push_folder(folder, REPO)
    files = hub.files(REPO)
    assert files["notes.txt"] == b"n" and not {name for name in stale if name != "notes.txt"} & set(files)
    assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("private", [True, False, None])
def test_a_new_repo_is_as_private_as_asked(hub, folder, private):
    push_folder(folder, REPO, PushOptions(private=private))
    assert hub.repos[REPO].private is bool(private)


def test_a_branch_is_made_and_main_is_left(hub, folder):
    push_folder(folder, REPO)
    main = hub.repos[REPO].refs["main"]
    make_model(seed=1).save_pretrained(folder)
    push_folder(folder, REPO, PushOptions(revision="half size"))
    assert hub.repos[REPO].refs["main"] == main
    assert hub.files(REPO, "half size")["model.safetensors"] != hub.files(REPO)["model.safetensors"]
    make_model(seed=2).save_pretrained(folder)
    push_folder(folder, REPO, PushOptions(revision="half size"))
    assert hub.files(REPO, "half size")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_pull_request_may_be_opened_on_anybodys_model(hub, folder):
    theirs = {"config.json": b"{}", "model.safetensors": b"theirs"}
    hub.add_repo("other/model", theirs)
    commit = push_folder(folder, "other/model", PushOptions(create_pr=True))
    assert commit.pr_url.endswith("/other/model/discussions/1")
    assert hub.files("other/model") == theirs
    assert "subprune_report.json" in hub.files("other/model", "refs/pr/1")


def test_prune_and_push_in_one_command(hub, tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("\n".join(" ".join("ab"[i >> j & 1] for j in range(6)) for i in range(20)))
    words = ["prune", str(tmp_path / "model"), "--data", str(tmp_path / "texts.txt"), "--units", "mlp", "--quiet"]

    refused = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "none"), "--push", "small"])
    assert isinstance(refused.exception, ValueError) and not (tmp_path / "none").exists()
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out"), "--push", REPO])
    assert done.exit_code == 0, done.output
    assert f"{hub.url}/{REPO}/commit/" in done.output.replace("\n", "")
    assert hub.files(REPO)["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert "## Before and after" in hub.files(REPO)["README.md"].decode()


def test_save_pretrained_pushes_what_loading_takes(hub, tmp_path):
    model = ragged("llama")
    model.save_pretrained(tmp_path / "out", push_to_hub=True, repo_id=REPO, commit_message="Saved")
    files = hub.files(REPO)
    assert {"config.json", "model.safetensors", "modeling_subprune.py"} <= set(files)
    assert {"auto_map", "subprune", "transformers_weights"} <= set(json.loads(files["config.json"]))
    assert "Saved" in hub.repos[REPO].messages.values()


# What is refused


def test_another_models_repo_is_overwritten_only_by_force(hub, folder):
    theirs = {".gitattributes": b"", "config.json": b"{}", "model.safetensors": b"other"}
    hub.add_repo(REPO, theirs)
    with pytest.raises(PushError, match=r"2 files that hf_subprune did not push .*config.json.*--create-pr.*--force"):
        push_folder(folder, REPO)
    assert hub.files(REPO) == theirs and hub.count("PUT", "") == 0
    push_folder(folder, REPO, PushOptions(force=True))
    assert hub.files(REPO)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_what_stands_on_a_branch_is_protected_too(hub, folder):
    push_folder(folder, REPO)
    hub.repos[REPO].commit("theirs", {"config.json": b"{}"}, "another model")
    with pytest.raises(PushError, match="did not push"):
        push_folder(folder, REPO, PushOptions(revision="theirs"))


def test_a_public_repo_gets_nothing_private(hub, folder):
    push_folder(folder, REPO)
    commits = len(hub.repos[REPO].commits)
    with pytest.raises(PushError, match=r"is public.*/user/small/settings"):
        push_folder(folder, REPO, PushOptions(private=True))
    assert len(hub.repos[REPO].commits) == commits


@pytest.mark.parametrize("name", ["small", "user/a/b", "user/a b"])
def test_a_name_that_is_none_is_refused_before_anything_is_saved(hub, report, tmp_path, name):
    with pytest.raises(ValueError, match="user/"):
        report.push_to_hub(name, make_model())
    assert hub.requests == [] and list((tmp_path / "staging").iterdir()) == []


def test_a_folder_without_a_report_or_a_model_is_refused(hub, tmp_path, report):
    with pytest.raises(FileNotFoundError, match="holds no subprune_report"):
        push_folder(tmp_path, REPO)
    (tmp_path / "subprune_report.json").write_text(json.dumps(report.to_dict()))
    with pytest.raises(FileNotFoundError, match="a report but no model"):
        push_folder(tmp_path, REPO)
    assert hub.requests == []


# What goes wrong


def test_without_a_token_the_model_is_saved_and_the_command_pushes_it(hub, report, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    model = make_model()
    with pytest.raises(PushError, match="hf auth login") as error:
        report.push_to_hub(REPO, model, make_tokenizer(), private=True, revision="v1")
    assert hub.requests == []
    command = shlex.split(str(error.value).splitlines()[-1])
    assert command == ["hf-subprune", "push", str(error.value.folder), REPO, "--private", "--revision", "v1"]
    monkeypatch.setenv("HF_TOKEN", WRITER)
    push_folder(command[2], command[3], PushOptions(private=True, revision="v1"))
    pushed = hub.files(REPO, "v1")
    assert {"tokenizer.json", "README.md", "plots/kept.png"} <= set(pushed)
    model.save_pretrained(error.value.folder.parent / "again")
    assert pushed["model.safetensors"] == (error.value.folder.parent / "again" / "model.safetensors").read_bytes()


def test_a_wrong_token_is_told(hub, folder):
    with pytest.raises(PushError, match="does not accept the token"):
        push_folder(folder, REPO, PushOptions(token="hf_wrong"))
    assert hub.repos == {}


def test_offline_nothing_is_asked(hub, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PushError, match="HF_HUB_OFFLINE is set") as error:
        push_folder(folder, REPO)
    assert hub.requests == [] and f"hf-subprune push '{folder}' {REPO}" in str(error.value)


def test_a_token_without_permission_sends_no_weights(hub, folder):
    with pytest.raises(PushError, match="may not write there"):
        push_folder(folder, REPO, PushOptions(token=READER))
    push_folder(folder, REPO)
    before, sent = hub.repos[REPO].refs["main"], hub.count("PUT", "")
    make_model(seed=1).save_pretrained(folder)
    with pytest.raises(PushError, match="may not write there") as error:
        push_folder(folder, REPO, PushOptions(token=READER))
    assert hub.repos[REPO].refs["main"] == before and hub.count("PUT", "") == sent
    assert READER not in str(error.value)


def test_an_upload_that_is_cut_commits_nothing_and_goes_on_where_it_stopped(hub, folder):
    large = sum(name.endswith((".png", ".safetensors")) for name in contents(folder))
    oid = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    hub.fail_next("PUT", f"/large/{oid}", "cut", times=20)
    with pytest.raises(PushError, match="the upload stopped") as error:
        push_folder(folder, REPO)
    assert "model.safetensors" in str(error.value)
    assert set(hub.files(REPO)) == {".gitattributes"} and len(hub.large) == large - 1
    hub.failures.clear()
    hub.requests.clear()
    push_folder(folder, REPO)
    assert hub.count("PUT", "/large/") == 1
    assert set(contents(folder)) <= set(hub.files(REPO))


def test_a_commit_that_fails_keeps_what_was_sent(hub, folder):
    hub.fail_next("POST", "/commit/main", "500")
    with pytest.raises(PushError, match="the upload stopped"):
        push_folder(folder, REPO)
    assert set(hub.files(REPO)) == {".gitattributes"}
    hub.requests.clear()
    push_folder(folder, REPO)
    assert hub.count("PUT", "/large/") == 0 and "model.safetensors" in hub.files(REPO)


def test_a_commit_that_came_between_is_not_overwritten(hub, folder, monkeypatch):
    push_folder(folder, REPO)
    make_model(seed=1).save_pretrained(folder)
    create_commit = huggingface_hub.HfApi.create_commit

    def after_somebody_else(self, *args, **options):
        hub.repos[REPO].commit("main", {"config.json": b"theirs"}, "meanwhile")
        return create_commit(self, *args, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", after_somebody_else)
    with pytest.raises(PushError, match="somebody else committed"):
        push_folder(folder, REPO)
    assert hub.files(REPO) == {"config.json": b"theirs"}


def test_a_stop_by_the_user_names_the_command(hub, folder, monkeypatch, caplog):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", stop)
    with pytest.raises(KeyboardInterrupt), caplog.at_level("WARNING", "hf_subprune.report.hub"):
        push_folder(folder, REPO)
    assert f"hf-subprune push '{folder}' {REPO}" in caplog.text


def test_the_command_says_every_option_but_the_token():
    options = PushOptions(private=True, revision="v 1", create_pr=True, force=True, token=WRITER)
    assert push_command("/a b", REPO, options) == (
        f"hf-subprune push '/a b' {REPO} --private --revision 'v 1' --create-pr --force"
    )


# The whole way, as a user goes it


def known_by_environment(hub, home):
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": WRITER,
        "HF_HOME": str(home),
    }


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    """A Hub, and what runs code in a process that knows it by its environment only, and gives what it prints."""
    home, imported = tmp_path_factory.mktemp("user"), (*LIBRARIES, *MODELS, "matplotlib.figure")
    with HubServer() as hub, started(*imported, **known_by_environment(hub, home)) as server:

        def run(code, folder, nothing_downloaded=False):
            if nothing_downloaded:
                shutil.rmtree(home)
            (folder / "code.py").write_text(f"import sys\nsys.stdout = open({str(folder / 'printed')!r}, 'w')\n{code}")
            assert server.run(folder / "code.py") == [0]
            return (folder / "printed").read_text()

        yield hub, run


PRUNE_AND_PUSH = """
import sys
sys.path.insert(0, {tests!r})
import torch
from hf_subprune import PruneConfig, prune
from test_hub import make_model, make_tokenizer

ids = torch.arange(320).reshape(20, 16) % 20
for keep in (0.75, 0.5):
    model = make_model()
    config = PruneConfig(keep=keep, units=("mlp",), layout={layout!r})
    report = prune(model, [{{"input_ids": row[None]}} for row in ids], config)
    commit = report.push_to_hub({repo!r}, model, make_tokenizer())
    hidden = model(ids[:2]).last_hidden_state.flatten().double()
    print(commit.oid, (hidden @ torch.linspace(-1, 1, len(hidden), dtype=torch.float64)).item())
"""
SHOW = """
import torch

ids = torch.arange(320).reshape(20, 16) % 20
hidden = model(ids[:2]).last_hidden_state.flatten().double()
print((hidden @ torch.linspace(-1, 1, len(hidden), dtype=torch.float64)).item())
"""
SHOW_TOKENS = """
print(tokenizer("b a")["input_ids"])
"""
WITHOUT_US = """
import sys

sys.modules["hf_subprune"] = None
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["stock", "ragged"])
def test_a_pushed_model_loads_in_a_fresh_process_at_every_revision(tmp_path, users, layout):
    (hub, run), repo = users, f"user/{layout}"
    code = PRUNE_AND_PUSH.format(tests=str(Path(__file__).parent), layout=layout, repo=repo)
    (first, first_sum), (_, last_sum) = (line.split() for line in run(code, tmp_path).splitlines())
    card = hub.files(repo)["README.md"].decode()
    load, *others = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    pinned = load.replace(f'("{repo}")', f'("{repo}", revision="{first}")')
    last, tokens, pinned_to_first = run(load + SHOW + SHOW_TOKENS + pinned + SHOW, tmp_path).splitlines()
    assert tokens == "[3, 2]"
    assert float(last) == pytest.approx(float(last_sum), abs=5e-6)
    assert float(pinned_to_first) == pytest.approx(float(first_sum), abs=5e-6)
    assert abs(float(first_sum) - float(last_sum)) > 1.5e-5
    # A stock model takes nothing of ours, a ragged one takes the code in the repo.
    assert ("import hf_subprune" in load) == (layout == "ragged")
    alone = next(code for code in others if "trust_remote_code" in code) if layout == "ragged" else load
    assert float(run(WITHOUT_US + alone + SHOW, tmp_path, nothing_downloaded=True)) == pytest.approx(
        float(last_sum), abs=5e-6
    )
