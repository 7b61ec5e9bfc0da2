from contract import contract_parameters


def pytest_generate_tests(metafunc) -> None:
    contract_parameters(metafunc)
