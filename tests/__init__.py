import sys

if "pytest" in sys.modules:  # not in the processes that tests start
    # before it is imported: a failed assertion in a support module shows its values, too
    sys.modules["pytest"].register_assert_rewrite("tests.support")
