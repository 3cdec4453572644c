"""How many leases a worker asks for: enough to fill its slots, and never twice for the same slot.

In: free slots, the number in each grant, the server's count in each Welcome. Out: `asked`, cumulative. Invariants: the
server owes (`asked − granted`) at most the groups that the free slots can start. Both counts only grow, so that late,
repeated and lost messages do no harm.
"""

from __future__ import annotations


class Credits:
    """Leases and evaluation requests asked for and granted since the session began. Each is one credit."""

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size
        self.asked = 0
        self.granted = 0

    def ask(self, num_free_slots: int) -> bool:
        """Ask for as many groups as the free slots can start, less those still owed. False if that is none.

        A partial group counts as one: with groups of 16, 1 to 16 free slots start one group and 17 start two.
        """
        num_groups = -(-num_free_slots // self._group_size)
        wanted = num_groups - (self.asked - self.granted)
        if wanted <= 0:
            return False
        self.asked += wanted
        return True

    def resume_from(self, granted: int) -> None:
        """Note the number of grants so far, from a grant or a Welcome. Grants that didn't arrive were lost on the way;
        their slots are asked for again."""
        self.granted = max(self.granted, granted)
        self.asked = max(self.asked, self.granted)
