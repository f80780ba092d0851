"""Plausible wrong answers to the exercises, and a notebook that tries them.

A wrong answer is the notebook's solution with one thing changed, as WRONG says. `with_wrong_answers` appends them to a
notebook as cells: it then fails, with the cell's id, where an exercise's check accepts one.
"""

import ast
import copy
from typing import Any

# {the solution cell's id: [(what stands there, what a wrong answer has instead)]}
WRONG = {
    "solution-saved": [
        ("2 * min(exchange_ms, shared_ms / 2)", "min(exchange_ms, shared_ms)"),
        ("2 * min(exchange_ms, shared_ms / 2)", "shared_ms"),
    ],
    "solution-own-order": [
        ("torch.where(is_first, -1, ids)", "ids"),
        ("dispatcher.end_combine(a) + dispatcher.end_combine(b)", "dispatcher.end_combine(a)"),
        (  # right, and nothing has experts beside it
            "y = dispatcher.end_combine(a) + dispatcher.end_combine(b)",
            "y = dispatcher.end_combine(a) + dispatcher.end_combine(b)\n"
            "        return InOrder.forward(layer, x, routing)",
        ),
    ],
    "solution-bias": [
        ("slices) + b2", "slices) + parts * b2"),
        ("x @ w1_mine + b1_mine)", "x @ w1_mine) + b1.sum()"),
        (
            "sum(F.gelu(x @ w1_mine + b1_mine) @ w2_mine for w1_mine, b1_mine, w2_mine in slices) + b2",
            "F.gelu(x @ w1 + b1) @ w2 + b2",
        ),
    ],
    "solution-forward": [
        ("token, home * weights", "torch.arange(len(home)) // ids.shape[1], home * weights"),
        ("home * weights.flatten()[order, None]", "home"),
        ("owner.argsort(stable=True)", "torch.arange(len(owner))"),
        (', "combine")', ', "combine") if len(rows) else out'),
        (  # right, and every row goes to every rank
            'rows = comm.all_to_all(x[token], there.tolist(), here, "dispatch")',
            'rows = comm.all_to_all(x[token], there.tolist(), here, "dispatch")\n'
            '    comm.all_gather(torch.zeros(100, 16).double(), "dispatch")',
        ),
    ],
    "solution-half": [
        ("return k", "return 0"),
        ("return k", "return 200"),
        ("ep_size / 2", "ep_size"),
        ("return k", "return ep_size // 2"),
    ],
    "solution-inverse": [
        ("torch.empty_like(order).index_copy(0, order, torch.arange(len(order)))", "order"),
        (
            "torch.empty_like(order).index_copy(0, order, torch.arange(len(order)))",
            "order.argsort()",
        ),  # right
        ("index_copy(0, order, torch.arange(len(order)))", "index_copy(0, torch.arange(len(order)), order)"),
    ],
    "solution-needed": [
        (".fill_diagonal_(0)", ""),
        ("torch.stack(owners)", "torch.stack(owners).T.contiguous()"),
    ],
    "solution-flag": [("* 5", "* 3"), ("[[2, 3]] * 2", "[[2, 3]] * 5"), ("[[0, 1]] * 5", "[[0]] * 10")],
    "solution-once": [
        ("everyones[:, IS_PADDING, None] == 0", "everyones[:, EXPERT, None] >= -1"),
        ("local.masked_fill(~is_mine, -1)", "ids.masked_fill(~is_mine, -1)"),
        ("weights[mine], AllGather", "weights[mine].flip(1), AllGather"),
        ("(owners == rank).any(dim=1)", "(owners == rank)"),
    ],
    "solution-activation": [
        ("def apply(gate, up=None):", "def apply(gate):"),  # a layer gives both
        ("def gradient(grad, gate, up=None):", "def gradient(grad, gate):"),
        ("grad * 2 * F.relu(gate), None", "2 * F.relu(gate), None"),
        ("grad * 2 * F.relu(gate), None", "grad * 2 * F.relu(gate)"),
        ("has_bias, is_gated = False, False", "has_bias, is_gated = True, False"),
        ("F.relu(gate).square()", "gate.square()"),
        (  # right, by autograd
            "return grad * 2 * F.relu(gate), None",
            "gate = gate.detach().requires_grad_()\n"
            "        return torch.autograd.grad(F.relu(gate).square(), gate, grad)[0], None",
        ),
    ],
    "solution-service": [
        ("keys.index_fill(", "keys.index_fill_("),  # right choices, and the probabilities are overwritten
        ("-math.inf", "0.5"),
        ("-math.inf", "0"),  # right while keys are positive
        ("if self.expert < 0:", "if self.expert <= 0:"),
        ("if not -1 <= self.expert < config.num_experts:", "if False:"),
        ("if self.expert >= 0 and config", "if False and config"),
    ],
    "solution-sparing": [
        (" or [0]", ""),
        ("w2[e].t(), b2[e]", "w2[e].t(), b2[0]"),
        ("b1[e]), up)", "b1[e]))"),
    ],
    "solution-update": [
        (".square().sum() / num_real", ".square().sum(-1).mean() / len(batches)"),
        ("for *_, is_real in batches)).clamp", "for *_, is_real in batches[:1])).clamp"),
        (
            "    for x, target, is_real in batches:\n",
            "    for x, target, is_real in batches:\n        if not is_real.any():\n            continue\n",
        ),
        ("sync_gradients(layer, mesh, total)", "sync_gradients(layer, mesh)"),
        ("layer(x[is_real]) - target[is_real]", "layer(x) - target"),
    ],
    "solution-evaluate": [
        ("    model.eval()\n", ""),
        ("with torch.no_grad():", "with torch.enable_grad():"),
        ("model.train(was_training)", "model.train()"),
        (" / len(batches)", ""),
        ("return mesh.batch.all_reduce(total).item()", "return total.item()"),
        ("sum(task.loss(model, batch)", "sum(mesh.batch.all_reduce(task.loss(model, batch))"),
        ("total = sum(", "total = 0 * sum("),
    ],
    "solution-alpha": [("aux_alpha=aux_alpha", "aux_alpha=0.0"), ("steps=300", "steps=20")],
    "solution-culprit": [
        ("note[2] == before[rank][2]", "False"),
        (
            "for rank, note in enumerate(after):\n        if note[1]",
            "for rank, note in enumerate(before):\n        if note[1]",
        ),
        ("_, collectives, _ in after", "collectives, _, _ in after"),
        ("note[1] < most", "note[0] < max(step for step, _, _ in after)"),
    ],
    "solution-flag-of-your-own": [
        ("@option_group\n", ""),
        ("keys.index_fill(1", "keys.clone() if True else keys.index_fill(1"),
        ("[self.out_of_service]", "[3]"),
        ("raise ValueError(", "print("),
        ("out_of_service: int", "outofservice: int"),
    ],
    "solution-command": [("--num-experts 48", "--num-experts 16"), ("--nnodes=3", "--nnodes=2")],
    "solution-splits": [("rows, rows.T", "rows.T, rows"), ("rows, rows.T", "rows, rows")],
    "solution-seal": [("[4, 5, 3]", "[3, 4, 5]"), ("[4, 5, 3]", "[6, 2, 4]")],
    "solution-bytes": [("(ids >= 0) & ", ""), ("3 * hidden_dim", "4 * hidden_dim"), ("+ 16 + 4", "")],
    "solution-home": [
        ("output_splits, input_splits,", "input_splits, output_splits,"),
        ("    set_riders(packed, d, grad_weights)\n", ""),
        (
            "home[:, :d], get_riders(home, d)",
            "home[:, :d], comm.all_to_all(grad_weights, output_splits, input_splits, 'dispatch backward')",
        ),
    ],
    "solution-sum": [
        ("torch.where(is_sent, picked, 0)", "picked"),
        (">= 0", "> 0"),
        (
            "torch.where(is_sent, picked, 0).sum(1)",
            "torch.stack([torch.where(s, p, 0).sum(0) for s, p in zip(is_sent, picked)])",
        ),
    ],
    "solution-pass-bytes": [
        ("2 + 4 + 4 + 4 + 4 + 2", "2 + 2 + 2 + 2 + 2 + 2"),
        ("(2 + 2) * numbers", "2 * numbers"),
    ],
    "solution-bias-gradient": [
        ("right=True", "right=False"),
        ("return sums[:-1]", "return sums[: int((counts >= 0).sum())]"),  # a number on the host
        ("return sums[:-1]", "return torch.stack([sums[e] for e in range(len(counts))])"),
    ],
    "solution-kernel": [
        ("is_sent & (column < num_columns)", "is_sent & (column >= 0)"),  # runs on into the next row
        ("row < tl.load(num_rows)", "row >= 0"),
        ("tl.load(weights + row,", "tl.load(weights,"),
        ("mask=mask, other=0.0", "other=0.0"),
        ("row * num_columns + column", "row * BLOCK + column"),
    ],
    "solution-counts": [
        (".cumsum(0) - in_a_round", ".cumsum(0)"),
        (" + everyone[: comm.rank].sum(0)", ""),
        (
            "everyone = comm.all_gather(rounds,",
            "comm.all_gather(rounds, 'metadata')\n    everyone = comm.all_gather(rounds,",
        ),
        ("places < capacity", "places <= capacity"),
    ],
    "solution-safe-factor": [
        ("config.num_experts / config.top_k", "float(config.num_experts)"),
        ("config.num_experts / config.top_k", "config.num_experts / 2"),
        ("/ config.top_k", "/ (config.top_k + 1)"),
    ],
    "solution-factor": [
        ("< load.max()", "<= load.max()"),
        ("load.max()", "load.float().mean()"),
        ("/ 100\n", "/ 100 + 0.01\n"),
    ],
    "solution-calm": [
        ("self.batch.all_reduce(self.load)", "self.load"),
        ("self.speed * (total > 0) *", "self.speed *"),
        ("1 / config.num_experts))", "1 / config.num_experts), persistent=False)"),
        ("+= 0.1 * torch.where", "+= torch.where"),
        ("1 / len(load) - self.share)", "self.share - 1 / len(load))"),
    ],
    "solution-hosts": [
        ("// experts_per_machine", "% experts_per_machine"),
        ("marked.sum(1).mean().item()", "float(topk_ids.shape[1])"),
    ],
    "solution-proportional": [
        ("self.batch.all_reduce(self.load)", "self.load"),
        (" / mean.clamp(min=1e-9)", ""),
        ("mean.clamp(min=1e-9)", "mean"),
        ("        self.load.zero_()\n", ""),
    ],
    "solution-policy": [
        ("topk_ids.T.flatten()", "topk_ids.flatten()"),
        ("places < capacity", "places <= capacity"),
        (  # by position: full in every place, and a second choice may take a first one's
            "topk_ids.T.flatten()\n    places = claim_places(wanted, None, probs.shape[1])\n"
            "    return torch.where(places < capacity, wanted, -1).view(topk_ids.T.shape).T.contiguous()",
            "topk_ids.flatten()\n    places = claim_places(wanted, None, probs.shape[1])\n"
            "    return torch.where(places < capacity, wanted, -1).view(topk_ids.shape)",
        ),
    ],
    "solution-own": [
        ("shares.tril(-1).sum(2)", "shares.tril().sum(2)"),
        ("shares.byte().argmax(2)", "torch.arange(owner.shape[1]).expand_as(owner)"),
        ("shares.byte().argmax(2), ", ""),
    ],
    "solution-tiles": [
        ("-(-counts // rows)", "counts // rows"),
        ("(counts.cumsum(0) - counts)[expert] + place * rows", "place * rows"),
        ("(tiles.cumsum(0) - tiles)[expert]", "tiles[expert]"),
    ],
    "solution-epilogue": [
        ("(row < end)[:, None] &", "(row >= 0)[:, None] &"),  # over the next expert's rows
        ("& (column < F)[None, :]", "& (column >= 0)[None, :]"),
        ("tl.load(weights + row,", "tl.load(weights + row % ROWS,"),
        ("tl.where(g > 0, g, 0.0)", "tl.where(g > 0, g, 0.1 * g)"),
        ("relu * u * w[:, None]", "relu * u"),
    ],
    "solution-hurts": [
        ("-(-counts // rows_of_tile)", "-(-counts.sum() // rows_of_tile)"),
        ("-(-columns // columns_of_tile)", "columns // columns_of_tile or 1"),
    ],
    "solution-cache": [
        ("1 / (4 + self.step - step)", "1"),
        ("in self.uses[expert])", "in self.uses[expert][-1:])"),
    ],
    "solution-place": [
        ("key=weight.__getitem__", "key=lambda r: -r"),
        ("return [e for own in ranks for e in own]", "return list(range(num_physical))"),
    ],
    "solution-across": [("len(set(away))", "len(away)"), ("for e in line if e >= 0", "for e in line")],
    "solution-room": [
        ("copies * per_row", "copies"),
        ("slots * per_row", "choices"),
        ("max(map(len, topk_ids))", "len(topk_ids[rank])"),
        ("(ids // local == rank)", "(ids % len(topk_ids) == rank)"),
    ],
    "solution-turns": [
        ("number - turns", "number - turns - 1"),
        ("number - turns", "number - turns + 1"),
        ("min(read)", "max(read)"),
        ("min(read) >= number - turns", "True"),
    ],
    "solution-way-home": [
        ("[plan.own][token]", "[p * num_slots : (p + 1) * num_slots][token]"),
        ("y[p * num_slots + token]", "y[token]"),
        (
            "torch.where(came, rows[p * num_slots : p * num_slots + len(total)], 0)",
            "rows[p * num_slots : p * num_slots + len(total)]",
        ),
        ("for n in is_used.sum(1)]", "for n in is_used.sum(1) + 1]"),
    ],
    "solution-often": [
        ("2 * save_s", "save_s"),
        ("2 * save_s * between_s", "between_s / save_s"),
        ("math.sqrt", "float"),
    ],
    "solution-reshard": [
        ("start : start + own", ":own"),
        ("first // old, (", "0, ("),
        ("(first + own - 1) // old + 1", "first // old + 1"),
    ],
    "solution-active": [
        ("3 * d * f * top_k", "2 * d * f * top_k"),
        ("3 * d * f * top_k", "3 * d * f * num_experts"),
        ("d * num_experts + ", ""),
        ("num_heads + num_kv_heads", "2 * num_heads"),
        ("d * vocab_size", "2 * d * vocab_size"),
    ],
    "solution-cut": [
        ("comm.rank + 1 :]", "comm.rank :]"),
        ("later = later[later != -100]", "later = later"),
        ("torch.cat([ids, ids.new_tensor([-100])])[:1]", "ids[:1]"),
        ("[: len(ids)]", ""),
    ],
}


def source_of(cell: dict[str, Any]) -> str:
    return cell["source"] if isinstance(cell["source"], str) else "".join(cell["source"])


def cells_tagged(notebook: dict[str, Any], tag: str) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if tag in cell["metadata"].get("tags", [])]


def check_calls(statement: ast.AST) -> list[ast.Call]:
    """The calls of a check in a statement."""
    calls = [node for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id.startswith("check_")]


def split_solution(source: str) -> tuple[str, str]:
    """A solution cell -> (its definitions, the expression that has the check look at them)."""
    tree = ast.parse(source)
    first = next(n for n, statement in enumerate(tree.body) if check_calls(statement))
    definitions = "\n".join(source.splitlines()[: tree.body[first].lineno - 1])
    last = [call for statement in tree.body[first:] for call in check_calls(statement)][-1]
    return definitions, ast.unparse(last)


ODD = """
def raising(*_, **__):
    raise OverflowError("too much\\nof a good thing")


class NoSize:
    def __len__(self):
        raise RuntimeError("no size")


odd = [lambda *_, **__: None, raising, lambda *_, **__: "text", lambda *_, **__: [1.5], lambda *_, **__: NoSize(),
       lambda *_, **__: torch.ones(2, 3), lambda: 1, None, 3, ""]
"""
UNCHANGED = """
class Unchanged({base}):
    pass


class Raising({base}):
    def {method}(self, *_):
        return [][0]


class Text({base}):
    def {method}(self, *_):
        return "text"


odd = [Unchanged, Raising, Text, lambda *_: None, None, 3]
"""
METHODS = {"AllGatherDispatcher": "begin_dispatch", "LoopExperts": "forward", "Options": "limit_choice"}


def odd_answers(definitions: str, check: ast.Call) -> str:
    """A cell that hands a check answers of other kinds: nothing, errors, wrong types, the class as it was given."""
    base = next(
        (n.bases[0].id for n in ast.parse(definitions).body if isinstance(n, ast.ClassDef) and n.bases), None
    )
    call = ast.Call(check.func, [ast.Name("answer"), *check.args[1:]], check.keywords)
    loop = f"for number, answer in enumerate(odd):\n    verdict = {ast.unparse(call)}\n    {ONE_LINE}, number, verdict)"
    odd = UNCHANGED.format(base=base, method=METHODS.get(base, "begin_dispatch")) if base else ODD
    return odd + "\n\n" + loop


ONE_LINE = (
    r"assert verdict.startswith('not yet: ') and '\n' not in verdict and len(verdict) < 500, ('verdict'"
)


def with_wrong_answers(notebook: dict[str, Any]) -> dict[str, Any]:
    """The notebook with wrong answers behind it, each in a cell of its own that expects one line: not yet, and why."""
    tried = json_copy(notebook)

    def add(name: str, source: str) -> None:
        cell = {"cell_type": "code", "id": name, "metadata": {"tags": ["check"]}, "source": source}
        tried["cells"].append(cell | {"execution_count": None, "outputs": []})

    for cell in cells_tagged(notebook, "solution"):
        definitions, check = split_solution(source_of(cell))
        name = cell["id"].replace("solution", "wrong")
        for number, (old, new) in enumerate(WRONG[cell["id"]], 1):
            wrong = definitions.replace(old, new)
            add(f"{name}-{number}", f"{wrong}\n\nverdict = {check}\n{ONE_LINE}, verdict)")
        add(f"{name}-odd", odd_answers(definitions, ast.parse(check, mode="eval").body))
    return tried


def json_copy(notebook: dict[str, Any]) -> dict[str, Any]:
    """A copy without outputs: they will be made anew."""
    tried = copy.deepcopy(notebook)
    for cell in tried["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return tried
