r"""ProPD (arXiv 2402.13485) in one file: a token tree drafted, sized, pruned, verified.

For one sequence, decoded greedily, on a Hugging Face model: to read, and to test against.

python examples/reference_decode.py demo/model $'class Stack:\n' --nodes 16 --prune
"""

from collections import namedtuple
from heapq import heappop, heappush
from math import exp
from pathlib import Path
from time import perf_counter

import rich
import torch
import typer
from rich.markup import escape
from rich.tree import Tree as Drawing
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from vllm_propd.heads.checkpoint import load_heads
from vllm_propd.heads.early import early_layers, load_early_head
from vllm_propd.heads.medusa import MedusaHeads

Node = namedtuple("Node", "token parent depth log_prob")  # log_prob: of its whole path
Tree = list[Node]  # parents first; node 0, the root, is the text's last token
Step = namedtuple("Step", "tree kept path")  # kept: not pruned; path: accepted, and root


def best_size(tree: Tree, seconds: dict[int, float]) -> int:
    """Sizes a tree (section 3.3): as many nodes as promise the most tokens per second.

    A node adds its path's probability to the tokens that a step can expect; the root adds
    1, for the token that every step gives. ``seconds`` are those of a step, by nodes.
    """
    expected = torch.tensor([node.log_prob for node in tree]).exp().cumsum(0).tolist()
    return max(seconds, key=lambda n: expected[n] / seconds[n] if n < len(tree) else 0)


def ancestors(tree: Tree) -> torch.Tensor:
    """``[nodes, nodes]`` bool: a node sees those on its path, and itself."""
    sees = torch.eye(len(tree), dtype=torch.bool)
    for number, node in enumerate(tree[1:], 1):
        sees[number] |= sees[node.parent]
    return sees


def keep_top_k(tree: Tree, logits: torch.Tensor, top_k: int) -> list[int]:
    """Prunes early (section 3.2): keeps children among the K that a kept node expects.

    The early head's ``logits``, ``[nodes, vocabulary]``, say what a node expects.
    """
    kept = [0]
    for number, node in enumerate(tree[1:], 1):
        better = logits[node.parent] > logits[node.parent, node.token]
        if node.parent in kept and better.sum() < top_k:
            kept.append(number)
    return kept


def accepted_path(tree: Tree, choice: dict[int, int]) -> list[int]:
    """Verifies: from the root on to the child that is the target's own choice there."""
    child, path = {(tree[n].parent, tree[n].token): n for n in choice}, [0]
    while (step := (path[-1], choice[path[-1]])) in child:
        path.append(child[step])
    return path


class Reference:
    """A target in float32, its Medusa heads, an early head to prune by; and how to draft.

    Trees have ``nodes`` nodes, or the best number up to that if sizes are ``dynamic``, of
    each head's ``ranks`` best tokens (1: a chain). ``top_k`` is early pruning's K; 0: off.
    """

    def __init__(
        self, folder: Path, heads: Path, nodes: int, ranks: int, top_k: int, dynamic: bool
    ):
        self.nodes, self.ranks, self.top_k, self.dynamic = nodes, ranks, top_k, dynamic
        self.target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config, checkpoint = self.target.config, load_heads(heads)
        checkpoint.check_fits(config.hidden_size, config.vocab_size)
        known = config.model_type in ("llama", "mistral", "qwen2", "qwen3")
        if not known or getattr(config, "sliding_window", None) or checkpoint.num_outputs:
            what = "llama, mistral, qwen2 or qwen3, no sliding windows"
            raise ValueError(f"target: {what}; heads: no output layers of their own")
        self.heads = MedusaHeads.from_checkpoint(checkpoint).float()
        self.early_layer = (early_layers(heads) or [1])[0]  # counted from 1
        if top_k:
            self.early_head = load_early_head(heads, self.early_layer, config)

    def grow(self, hidden: torch.Tensor, root: int) -> Tree:
        """Drafts a tree (section 3.3): again and again the most probable path left out.

        Head d guesses the token at depth d + 1, on every branch the same, from ``hidden``,
        the state that has predicted the root. A path is the product of its guesses.
        """
        guesses = self.target.lm_head(self.heads(hidden[None])[:, 0]).log_softmax(-1)
        values, tokens = ([*best.tolist(), []] for best in guesses.topk(self.ranks))
        tree, heap = Tree(), [(0.0, 0, 0, Node(root, -1, 0, 0.0))]
        while heap and len(tree) <= self.nodes:
            node = heappop(heap)[-1]
            tree.append(node)
            for value, token in zip(values[node.depth], tokens[node.depth], strict=True):
                child = Node(token, len(tree) - 1, node.depth + 1, node.log_prob + value)
                heappush(heap, (-child.log_prob, child.parent, len(heap), child))
        return tree

    def forward(self, tree: Tree) -> tuple[torch.Tensor, list[int]]:
        """A tree's last hidden states ``[kept, hidden]``, and which nodes were kept.

        A node attends to the text in the cache and to its ancestors, and stands ``depth``
        after the root. Only nodes that are kept go past the early layer.
        """
        base, cache, past = self.target.model, self.cache, self.cache.get_seq_length()
        rows, sees = torch.arange(len(tree)), ancestors(tree)
        positions = torch.tensor([past + node.depth for node in tree])
        stream = base.embed_tokens(torch.tensor([[node.token for node in tree]]))
        for done, layer in enumerate(base.layers):
            if self.top_k and done == self.early_layer:
                logits = self.early_head.logits(stream[0], self.target.lm_head)
                rows = torch.tensor(keep_top_k(tree, logits, self.top_k))
                stream = stream[:, rows]
            mask = torch.cat([sees.new_ones(len(rows), past), sees[rows][:, rows]], 1)
            mask, rotary = mask[None, None], base.rotary_emb(stream, positions[None, rows])
            stream = layer(stream, mask, position_embeddings=rotary, past_key_values=cache)
        return base.norm(stream)[0], rows.tolist()

    def commit(self, past: int, path: list[int], kept: list[int]) -> None:
        """Leaves in the cache ``past`` tokens, and of the tree the accepted path."""
        for number, layer in enumerate(self.cache.layers):
            rows = path if number < self.early_layer else map(kept.index, path)
            index = [*range(past), *(past + row for row in rows)]
            layer.keys, layer.values = layer.keys[:, :, index], layer.values[:, :, index]

    def step_seconds(self, tree: Tree, past: int) -> dict[int, float]:
        """Times steps of 0, 1, 2, 4, 8... nodes, twice: the first warm up."""
        seconds = {}
        for nodes in [0, *(2**power for power in range(self.nodes.bit_length()))] * 2:
            began, (_, kept) = perf_counter(), self.forward(tree[: nodes + 1])
            seconds[nodes] = perf_counter() - began
            self.commit(past, [], kept)
        return seconds

    @torch.inference_mode()
    def decode(self, prompt: list[int], max_tokens: int) -> tuple[list[int], list[Step]]:
        """The new tokens, at most so many, and the steps behind them."""
        self.cache, seconds, steps = DynamicCache(), dict[int, float](), list[Step]()
        ends = self.target.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        states = self.target.model(torch.tensor([prompt]), past_key_values=self.cache)[0][0]
        hidden, text = states[-1], [int(self.target.lm_head(states[-1]).argmax())]
        while len(text) < max_tokens and text[-1] not in ends:
            past, tree = len(prompt + text) - 1, self.grow(hidden, text[-1])
            if self.dynamic:
                seconds = seconds or self.step_seconds(tree, past)
                tree = tree[: best_size(tree, seconds) + 1]
            states, kept = self.forward(tree)
            choice = self.target.lm_head(states).argmax(-1).tolist()
            path = accepted_path(tree, dict(zip(kept, choice, strict=True)))
            self.commit(past, path, kept)
            steps.append(Step(tree, kept, path))
            last = kept.index(path[-1])
            hidden, new = states[last], [tree[n].token for n in path[1:]] + [choice[last]]
            ended = [at for at, token in enumerate(new, 1) if token in ends]
            text += new[: min(ended, default=len(new))]
        return text[:max_tokens], steps


def main(
    model: Path, prompt: str, heads: Path | None = None, max_tokens: int = 64,
    nodes: int = 16, chain: bool = False, dynamic: bool = False, prune: bool = False,
    top_k: int = 20,
) -> None:  # fmt: skip
    """Decode with ProPD and plainly; compare, and draw the last tree."""
    folder, ranks, top_k = heads or model / "propd", 1 if chain else 10, prune * top_k
    try:
        reference = Reference(model, folder, nodes, ranks, top_k, dynamic)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt")
    text, steps = reference.decode(ids.input_ids[0].tolist(), max_tokens)
    plain = reference.target.generate(**ids, do_sample=False, max_new_tokens=max_tokens)
    same = plain[0].tolist() == ids.input_ids[0].tolist() + text
    typer.echo(prompt + tokenizer.decode(text))
    for tree, kept, path in steps[-1:]:
        drawing: list[Drawing] = []
        for number, node in enumerate(tree):
            label = escape(f"{tokenizer.decode([node.token])!r} {exp(node.log_prob):.3f}")
            label += " accepted" * (number in path) + " pruned" * (number not in kept)
            drawing.append(drawing[node.parent].add(label) if number else Drawing(label))
        each = (len(text) - 1) / len(steps)
        rich.print(f"{each:.2f} tokens per step. The last step's tree:", drawing[0])
    rich.print("The same text as plain greedy decoding." if same else "NOT greedy's text!")
    raise typer.Exit(not same)


if __name__ == "__main__":
    typer.run(main)
