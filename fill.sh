sleep 22; dd if=/dev/zero of=/tmp/small/fill bs=1M count=560 2>/dev/null
