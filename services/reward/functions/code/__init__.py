"""Rewards for code, by its tests."""

from services.reward.functions.code.function import CodeTests, code_tests

__all__ = ["CodeTests", "code_tests"]
