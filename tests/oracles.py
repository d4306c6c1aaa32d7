"""Plain constructions that the tests compare with: slow, by another route, no jax."""


def plain_sequence(world, prompt, first, second):
    """The sequence as a list of token names, from the definition."""
    spec = world.spec
    text = [spec.letters[i] for i in prompt.letters if i >= 0]
    used = ["$", *(spec.tokens[i] for i in prompt.tasks), "*", *text, ">", *first, "*^", *second, "*^", "%"]
    return used + ["#"] * (3 * spec.max_text + 10 - len(used))


def plain_outputs(world, prompt):
    """Both blocks by applying one permutation after the other, letter by letter."""
    table = world.bijections[int(prompt.pcfg)]
    letters = [int(i) for i in prompt.letters if i >= 0]
    blocks = []
    for pair in (prompt.tasks[:2], prompt.tasks[2:]):
        for task in pair:
            letters = [int(table[int(task)][i]) for i in letters]
        blocks.append([world.spec.letters[i] for i in letters])
    return blocks
