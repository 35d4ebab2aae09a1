"""`python -m parity`: writes the ledger."""

from parity.ledger import run

if __name__ == "__main__":
    run()
