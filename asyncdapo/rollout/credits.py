"""How many leases a worker asks for: enough to fill its slots, never twice for the same room.

In: free slots, the number of every grant as it arrives, the server's count at every Welcome. Out: `asked`, cumulative.
The invariants: the server owes (`asked − granted`) at most the groups that the free slots can start; both counts only
grow, so that a message that comes late, twice or never leaves them right.
"""

from __future__ import annotations


class Credits:
    """Leases and evaluation requests asked for and granted since the session began; one of either is one credit."""

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size
        self.asked = 0
        self.granted = 0

    def ask(self, num_free_slots: int) -> bool:
        """Raise `asked` to what the free slots can start beyond what is still owed; false when that is nothing.

        A partly free group counts as one: 1 to 16 free slots of groups of 16 start one group, 17 start two.
        """
        num_groups = -(-num_free_slots // self._group_size)
        wanted = num_groups - (self.asked - self.granted)
        if wanted <= 0:
            return False
        self.asked += wanted
        return True

    def go_on_from(self, granted: int) -> None:
        """So many grants there have been, says the number of one or a Welcome. Beyond those that arrived: the others
        were lost on the way, and their room is asked for again."""
        self.granted = max(self.granted, granted)
        self.asked = max(self.asked, self.granted)
