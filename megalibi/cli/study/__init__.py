"""``megalibi study NAME``: the studies, and the measurements that they start as processes of their own."""
