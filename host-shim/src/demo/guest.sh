# What the demonstration's guest does. STAGE, SECRET and MARKERS come from the kernel command line.
mounted() { mount -t ext4 /dev/vda /mnt; }

# What cloud-init does: a token, then the question with it.
network() {
    ip link set lo up
    ip link set eth0 up
    address=$(udhcpc -i eth0 -n -q -s /sbin/lease 2>/dev/null | sed -n 's/^lease //p')
    imds=169.254.169.254
    token=$(printf 'PUT /latest/api/token HTTP/1.1\r\nHost: %s\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\nConnection: close\r\n\r\n' $imds |
        nc $imds 80 | tail -n 1)
    instance=$(wget -q -O - --header "X-aws-ec2-metadata-token: $token" http://$imds/latest/meta-data/instance-id)
    echo "demo: network $address of $instance over DHCP and the metadata service"
}

case "$STAGE" in
write)
    network
    echo "demo: the disk is $(cat /sys/block/vda/serial), $(cat /sys/block/vda/size) sectors"
    /sbin/mke2fs -q -F -t ext4 -L demo /dev/vda && mounted || { echo "demo: failed"; exit; }
    echo "demo: made a file system"
    yes "$SECRET" | head -n "$MARKERS" > /mnt/secret.txt
    head -c 8000000 /dev/urandom > /mnt/random.bin
    mkdir /mnt/small
    for i in $(seq 100); do echo "file $i: $SECRET" > "/mnt/small/$i"; done
    (cd /mnt && find . -type f ! -name sums | xargs sha256sum > sums)
    sync
    echo "demo: wrote $(wc -l < /mnt/sums) files, synced"
    umount /mnt && echo "demo: written"
    ;;
verify)
    mounted || { echo "demo: failed"; exit; }
    lines=$(grep -c "$SECRET" /mnt/secret.txt)
    if (cd /mnt && sha256sum -s -c sums) && [ "$lines" = "$MARKERS" ]; then
        umount /mnt && echo "demo: verified all files, $lines lines of the secret"
    else
        echo "demo: files differ"
    fi
    ;;
read)
    echo "demo: reading the whole disk"
    if dd if=/dev/vda of=/dev/null bs=64k; then echo "demo: read all"; else echo "demo: read failed"; fi
    ;;
esac
