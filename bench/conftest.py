"""``pytest bench`` times, though the tests of this project run with benchmarks off."""


def pytest_configure(config):
    config.option.benchmark_disable = False  # before pytest-benchmark reads it: that configures itself last
