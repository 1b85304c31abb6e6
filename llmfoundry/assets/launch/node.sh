# What every node runs; between systems only the node's rank and the address of node 0 differ.
@{counts}
export NODE_RANK=@{node_rank}
export MASTER_ADDR=@{master_addr}
export MASTER_PORT=@{master_port}
@{exports}
@{enter}
exec @{limit}composer @{script} @{arguments}
