"""`python -m headgate.shard --config shard.json`: one shard process, started by the launcher."""

from __future__ import annotations

from headgate import garbage

if __name__ == "__main__":
    garbage.hold_off()
    from headgate.shard.process import main

    main()
