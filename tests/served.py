"""Small causal language models with a byte-level tokenizer, and what llama.cpp makes of their GGUF files."""

import json
import urllib.request

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = """
A pruned model is dense: whole neurons and heads are gone, and the layers that read them got new weights. What other
programs make of it is tried here on a small one with 12 or 345 tokens of text, such as this, in which words return.
def exported(self, model: Model, folder: Path) -> None:
    for name, tensor in model.named_parameters():  # it's written under the name that the other program has
        self.writer.add_tensor(self.names[name], tensor.numpy())
    self.writer.write(folder / "model.gguf")
Weights keep their precision, the tokenizer keeps its merges; layers that add nothing aren't written, and so the words
of the answer are the same words, one after the other, if the numbers before them are nearly the same numbers.
"""
PROMPT = "def exported(model):"
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
ROWS = 400
"""Of the embedding: some more than there are tokens."""
_LETTER = 66
_GREEDY = {"temperature": 0, "ignore_eos": True, "cache_prompt": False}


def byte_level(before=None, **model_options):
    """A byte-level BPE tokenizer, trained on that text, that splits text as said; anew at each call."""
    backend = Tokenizer(models.BPE(**model_options))
    backend.pre_tokenizer = before or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=ROWS - 8, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    )


def causal_lm(cls=LlamaForCausalLM, config=LlamaConfig, **sizes):
    """A seeded model whose logits are far enough apart for greedy tokens to be decided."""
    torch.manual_seed(0)
    values = {"vocab_size": ROWS, "bos_token_id": 0, "eos_token_id": 1, **SIZES, **sizes}
    model = cls(config(**values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if "norm" in name else 0.15)
    return model


def greedy(model, prompt, tokens=32):
    """Ids that a model of Transformers goes on with, whatever they are but the end."""
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": tokens, "do_sample": False, "suppress_tokens": [1], "pad_token_id": 1}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


class LlamaCpp:
    """A GGUF file in llama.cpp's server, on one thread."""

    def __init__(self, path):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 128, 1, False, 0
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def ask(self, path, **request):
        """The answer to a request, as JSON."""
        body = json.dumps(request).encode()
        asked = urllib.request.Request(
            self.server.listening_address + path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.load(answer)

    def greedy(self, prompt, tokens=32):
        """Ids that it goes on with after a text or after ids, whatever they are but the end."""
        answer = self.ask("/completion", prompt=prompt, n_predict=tokens, return_tokens=True, **_GREEDY)
        return answer["tokens"]

    def log_probabilities(self, prompt):
        """Of every token after a prompt, whichever of them is taken: `(rows,)` float32."""
        # Where the bytes of a token are no letter, nothing is shown of it.
        forced = {"n_predict": 1, "n_probs": ROWS, "logit_bias": [[_LETTER, 1000.0]]}
        (step,) = self.ask("/completion", prompt=prompt, **forced, **_GREEDY)["completion_probabilities"]
        found = torch.full((ROWS,), -torch.inf)
        for entry in step["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def tokens(self, text):
        """Ids of a text, special ones at its ends included."""
        return self.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
