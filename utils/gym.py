"""Tasks of the package reasoning-gym: its questions, with its own scorers (arXiv:2505.24760).

Left out: several of its tasks in one run, its curricula.
Run: python sft.py --data task:gym:spell_backward --tokenizer char
"""
import ast

from utils.cli import die, need


def gym(spec):
    """NAME or NAME:SETTING=VALUE:… of reasoning-gym -> sample and reward, the two functions of a Task."""
    package = need("reasoning_gym", "gym")
    known = package.factory.DATASETS
    name, *parts = spec.split(":")
    if name not in known:
        die(f"--task gym:{name} is unknown to reasoning-gym: wanted {', '.join(sorted(known))}")
    settings = {"size": 10**6, "seed": 0}
    for part in parts:
        setting, _, value = part.partition("=")
        try:
            settings[setting] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            die(f"--task gym:{spec}: {part!r} is no setting: wanted one as Python writes it: max_terms=2")
    try:
        dataset = package.create_dataset(name, **settings)
        dataset.score_answer(dataset[0]["answer"] or "", dataset[0])  # it must not fail on its own
    except Exception as error:  # each dataset checks its settings in a way of its own
        why = " ".join(str(error).split()) or type(error).__name__
        die(f"--task gym:{spec}: {why}. Its settings: {', '.join(known[name][1].__annotations__)}")

    def sample(rng):
        entry = dataset[rng.randrange(len(dataset))]
        return {"prompt": entry["question"], "short": f"{entry['question'].strip()}\n", **entry}

    def reward(completion, row):
        try:
            return dataset.score_answer(completion.strip(), row)
        except Exception:  # some scorers, prime_factorization's for one, raise at text that is no number
            return 0.0
    return sample, reward
