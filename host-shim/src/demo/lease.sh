#!/bin/sh
# What the demonstration's DHCP client calls.
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip route add default via "$router"
echo "lease $ip"
