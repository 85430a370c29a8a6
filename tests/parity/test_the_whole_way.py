"""From a released format to transformers and back, by the command line: the same greedy tokens at every station."""

import checkpoints
import pytest
from click.testing import CliRunner

from dsjax.cli import cli
from dsjax.data.tokenizer import Tokenizer, bytes_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.23")

CFG = checkpoints.replace(checkpoints.WIDE, vocab_size=264, rope_scaling=checkpoints.YARN)
PROMPT, NEW = "def greet(name):", 32


def run(*args) -> str:
    result = CliRunner().invoke(cli, [str(a) for a in args], prog_name="dsjax")
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_fp8_in_text_out_export_and_transformers_writes_the_same(tmp_path):
    hub, mine, out = (tmp_path / name for name in ("hub", "mine", "out"))
    checkpoints.write(hub, checkpoints.quantised(checkpoints.draw(CFG), CFG), CFG)
    bytes_tokenizer().save(hub / "tokenizer.json")
    run("convert", "import", hub, mine, "--dtype=float32")
    options = ("--prompt", PROMPT, "--temperature=0", f"--max-tokens={NEW}")
    text = run("generate", mine, *options)
    run("convert", "export", mine, out, "--dtype=float32")

    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = Tokenizer.load(out)
    prompt = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(PROMPT)]])
    theirs = model.generate(prompt, do_sample=False, max_new_tokens=NEW, eos_token_id=tokenizer.eos_id)[0]
    assert len(theirs) == prompt.shape[1] + NEW
    assert text == tokenizer.decode(theirs[prompt.shape[1] :].tolist())
    assert len(set(theirs[prompt.shape[1] :].tolist())) > 8  # not one token again and again
