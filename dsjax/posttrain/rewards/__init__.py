"""The parts of a reward, one file each. A new one is a file with a `Reward`, and an entry here."""

from dsjax.posttrain.problem import Reward
from dsjax.posttrain.rewards import accuracy, choice, code, format, gym, language

REWARDS: dict[str, Reward] = {
    "accuracy": accuracy.REWARD,  # the answer in \boxed{} or <answer> is the one expected
    "format": format.REWARD,  # R1-Zero's four tags
    "think": format.THINK,  # R1's own form: </think>, and something behind it
    "language": language.REWARD,  # share of words of the problem's language
    "choice": choice.REWARD,  # the letter
    "code": code.REWARD,  # a program's output, in the sandbox
    "gym": gym.REWARD,  # as the reasoning-gym data set scores it
}
