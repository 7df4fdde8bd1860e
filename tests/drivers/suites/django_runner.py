"""Runs Django's tests and writes the outcome of each to the file that OUTCOMES names, as JSON."""

import json
import os
import unittest

from django.test.runner import DiscoverRunner


class Result(unittest.TextTestResult):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.outcomes = {}

    def startTest(self, test):
        super().startTest(test)
        self.outcomes.setdefault(test.id(), "passed")

    def addError(self, test, error):
        super().addError(test, error)
        self.outcomes[test.id()] = "error"

    def addFailure(self, test, error):
        super().addFailure(test, error)
        self.outcomes[test.id()] = "failure"

    def addSubTest(self, test, subtest, error):
        super().addSubTest(test, subtest, error)
        if error is not None:
            self.outcomes[test.id()] = "failure"

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        self.outcomes[test.id()] = "skipped"

    def stopTestRun(self):
        super().stopTestRun()
        with open(os.environ["OUTCOMES"], "w") as file:
            json.dump(self.outcomes, file)


class Runner(DiscoverRunner):
    def get_resultclass(self):
        return Result
