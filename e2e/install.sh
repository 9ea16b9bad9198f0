#!/bin/bash
# install.sh: inside the host VM, installs keybroker as `make install` does on any host, as far as it is built.
set -euo pipefail
if [[ -x /share/bin/keybroker && -x /share/bin/keybroker-agent ]]; then
	make -s -C /share install
else
	echo 'install.sh: keybroker is not built; nothing to install'
fi
