#!/bin/bash
# Rendered by: @{command}
@{usage}
set -euo pipefail

@{node}
