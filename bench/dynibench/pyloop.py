"""
The program that is measured as `python`: scans, parses and evaluates arithmetic in nothing but Python, for ever.

Its rounds are counted in the first eight bytes of the file named on the command line. Each round's sums are compared with
those of Python's own `eval`; a wrong one ends the program.
"""

import mmap
import struct
import sys


class Number:
    """A leaf."""

    def __init__(self, value):
        self.value = value

    def evaluate(self):
        return self.value


class Operation:
    """Two parts and what to do with them."""

    def __init__(self, sign, left, right):
        self.sign, self.left, self.right = sign, left, right

    def evaluate(self):
        left, right = self.left.evaluate(), self.right.evaluate()
        if self.sign == "+":
            return left + right
        if self.sign == "-":
            return left - right
        return left * right


def tokens(text):
    """Numbers, signs and brackets, one by one."""
    digits = ""
    for letter in text:
        if letter.isdigit():
            digits += letter
            continue
        if digits:
            yield digits
            digits = ""
        if letter != " ":
            yield letter
    if digits:
        yield digits


class Parser:
    """Recursive descent: sums of products of numbers and brackets."""

    def __init__(self, text):
        self.tokens, self.at = list(tokens(text)), 0

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def take(self):
        token = self.tokens[self.at]
        self.at += 1
        return token

    def sum(self):
        left = self.product()
        while self.peek() in ("+", "-"):
            left = Operation(self.take(), left, self.product())
        return left

    def product(self):
        left = self.factor()
        while self.peek() == "*":
            left = Operation(self.take(), left, self.factor())
        return left

    def factor(self):
        token = self.take()
        if token != "(":
            return Number(int(token))
        inner = self.sum()
        self.take()
        return inner


def texts():
    """Expressions that differ in length, depth and signs."""
    for n in range(24):
        parts = [f"({n + k} {'+-*'[k % 3]} {7 * k % 11}) {'*+-'[(n + k) % 3]} {k * k % 97}" for k in range(1, n % 7 + 3)]
        yield " + ".join(parts)


def one_round(expressions):
    """Evaluates all, and files the results by their last digit."""
    table = {}
    for text in expressions:
        value = Parser(text).sum().evaluate()
        table.setdefault(value % 10, []).append(value)
    return sorted((digit, sum(values), max(values)) for digit, values in table.items())


def main(path):
    """Rounds without end."""
    expressions = list(texts())
    table = {}
    for text in expressions:
        value = eval(text)  # the yardstick: of constants above, never of input
        table.setdefault(value % 10, []).append(value)
    expected = sorted((digit, sum(values), max(values)) for digit, values in table.items())
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 8)
    rounds = 0
    while True:
        if one_round(expressions) != expected:
            sys.exit("a wrong sum")
        rounds += 1
        struct.pack_into("<Q", memory, 0, rounds)


if __name__ == "__main__":
    main(sys.argv[1])
