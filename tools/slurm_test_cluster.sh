#!/bin/bash
# A real Slurm of two virtual nodes with accounting on this machine, for tests: slurm_test_cluster.sh up|down|status
#
# Debian's slurm-wlm, slurmdbd, munge and MariaDB, run as root, and an SSH server, which makes this machine its login
# node too. Everything but /etc/slurm and a line of /etc/ssh/ssh_known_hosts lies in one folder, which `down` removes. A
# machine that has a Slurm configuration of its own is left alone.
set -euo pipefail

home=/var/lib/megatron-opd-slurm
host=$(hostname -s)
mark="# megatron-opd: test cluster"
nodes=(node1 node2)
packages=(slurm-wlm slurmdbd munge mariadb-server openssh-server openssh-client rsync)
ssh_port=16822
known_hosts=/etc/ssh/ssh_known_hosts

say() { echo "slurm_test_cluster: $*"; }
fail() { echo "slurm_test_cluster: error: $*" >&2; exit 2; }

ours() { [[ -f /etc/slurm/slurm.conf ]] && head -1 /etc/slurm/slurm.conf | grep -qxF "$mark"; }

refuse_others() {
    if [[ -e /etc/slurm/slurm.conf ]] && ! ours; then
        fail "/etc/slurm/slurm.conf is of another cluster; this script leaves it alone"
    fi
    if ! ours && pgrep '^slurm.*d$' >/dev/null; then
        fail "a Slurm daemon of another cluster runs here; this script leaves it alone"
    fi
}

install_packages() {
    local missing=()
    for package in "${packages[@]}"; do
        dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing+=("$package")
    done
    [[ ${#missing[@]} -eq 0 ]] && return
    say "installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    # The packages would start services of their own.
    local policy=/usr/sbin/policy-rc.d
    [[ -e $policy ]] || { printf '#!/bin/sh\nexit 101\n' >$policy; chmod +x $policy; trap "rm -f $policy" EXIT; }
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$home/apt.log" 2>&1 ||
        fail "apt-get failed, see $home/apt.log"
}

write_configuration() {
    local cpus memory
    cpus=16 # more than there are: jobs are to run side by side
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    cat >/etc/slurm/slurm.conf <<EOF
$mark
ClusterName=megatron-opd-test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
# A requeued job waits until old credentials have expired.
AuthInfo=cred_expire=5
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool/%n
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/slurmd-%n.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/slurmd-%n.log
SlurmctldPort=16817
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerType=sched/backfill
# Seconds between its looks at the queue, in which requeued jobs wait for it.
SchedulerParameters=bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=30
JobRequeue=1
MpiDefault=none
MessageTimeout=30
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=16819
AccountingStorageEnforce=associations,limits,qos
JobAcctGatherType=jobacct_gather/none
NodeName=${nodes[0]} NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=$cpus RealMemory=$memory
NodeName=${nodes[1]} NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=$cpus RealMemory=$memory
# Jobs of the partition "urgent" take the nodes from those of "test", which have a minute to save.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=${nodes[0]},${nodes[1]} Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=${nodes[0]},${nodes[1]} MaxTime=60 State=UP PriorityTier=2
EOF
    cat >/etc/slurm/slurmdbd.conf <<EOF
AuthType=auth/munge
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
LogFile=$home/slurmdbd.log
PidFile=$home/slurmdbd.pid
EOF
    chmod 600 /etc/slurm/slurmdbd.conf
    echo "$mark" >/etc/slurm/cgroup.conf
}

# wait_for SECONDS WHAT COMMAND...
wait_for() {
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < until)) || fail "$what did not come up; its log is in $home"
        sleep 0.3
    done
}

start_munge() {
    munge -n >/dev/null 2>&1 && return
    [[ -f /etc/munge/munge.key ]] || mungekey --create
    install -d -o munge -g munge /run/munge /var/log/munge /var/lib/munge
    chown munge:munge /etc/munge/munge.key
    runuser -u munge -- munged
    wait_for 20 munged munge -n
}

sql() { mariadb --socket="$home/mysql.sock" --user=root "$@"; }

start_database() {
    sql -e 'select 1' >/dev/null 2>&1 && return
    [[ -d $home/mysql/mysql ]] ||
        mariadb-install-db --user=root --datadir="$home/mysql" --auth-root-authentication-method=normal >"$home/mysql.log" 2>&1
    mariadbd --no-defaults --user=root --datadir="$home/mysql" --socket="$home/mysql.sock" --pid-file="$home/mysql.pid" \
        --skip-networking --innodb-buffer-pool-size=32M --innodb-flush-log-at-trx-commit=0 >>"$home/mysql.log" 2>&1 &
    wait_for 60 mariadbd sql -e 'select 1'
    sql -e 'create database if not exists slurm_acct_db'
}

start_daemons() {
    alive slurmdbd || MYSQL_UNIX_PORT="$home/mysql.sock" slurmdbd
    wait_for 60 slurmdbd sacctmgr -n list cluster
    if ! sacctmgr -n -P list account megatron-opd format=account | grep -qx megatron-opd; then
        sacctmgr -i -Q add cluster megatron-opd-test || true
        sacctmgr -i -Q add account megatron-opd cluster=megatron-opd-test
        sacctmgr -i -Q add user root account=megatron-opd
    fi >/dev/null
    alive slurmctld || slurmctld
    wait_for 60 slurmctld scontrol ping
    local node
    for node in "${nodes[@]}"; do
        alive "slurmd-$node" || slurmd -N "$node"
    done
    wait_for 60 "the nodes" nodes_idle
}

# Listens on this machine alone; the key for it is $home/ssh/key.
start_ssh() {
    alive sshd && return
    mkdir -p "$home/ssh" /run/sshd
    [[ -f $home/ssh/host ]] || ssh-keygen -q -t ed25519 -N '' -f "$home/ssh/host"
    [[ -f $home/ssh/key ]] || ssh-keygen -q -t ed25519 -N '' -f "$home/ssh/key"
    cp "$home/ssh/key.pub" "$home/ssh/authorized_keys"
    cat >"$home/ssh/sshd_config" <<EOF
ListenAddress 127.0.0.1:$ssh_port
HostKey $home/ssh/host
PidFile $home/sshd.pid
AuthorizedKeysFile $home/ssh/authorized_keys
PasswordAuthentication no
PermitRootLogin prohibit-password
UsePAM no
EOF
    forget_ssh
    echo "[127.0.0.1]:$ssh_port $(cut -d' ' -f1,2 "$home/ssh/host.pub")" >>"$known_hosts"
    /usr/sbin/sshd -f "$home/ssh/sshd_config" -E "$home/sshd.log"
    wait_for 20 sshd alive sshd
}

forget_ssh() { if [[ -f $known_hosts ]]; then sed -i "/^\[127.0.0.1\]:$ssh_port /d" "$known_hosts"; fi; }

alive() { [[ -f $home/$1.pid ]] && kill -0 "$(cat "$home/$1.pid")" 2>/dev/null; }

nodes_idle() { [[ $(sinfo -h -N -p test -o '%N %t' | grep -cE ' (idle|alloc|mix)$') -eq ${#nodes[@]} ]]; }

up() {
    refuse_others
    mkdir -p "$home"/{state,spool,mysql}
    install_packages
    write_configuration
    start_munge
    start_database
    start_daemons
    start_ssh
    say "up: $(sinfo -h -p test -o '%D nodes in partition %P'), account megatron-opd; take it down with: $0 down"
}

stop_pid() {
    alive "$1" || return 0
    local pid
    pid=$(cat "$home/$1.pid")
    kill "$pid" 2>/dev/null || true
    for _ in {1..50}; do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
    kill -9 "$pid" 2>/dev/null || true
}

down() {
    refuse_others
    if ours && alive slurmctld; then
        scancel --user=root --signal=KILL 2>/dev/null || true
        scancel --user=root 2>/dev/null || true
        for _ in {1..100}; do [[ -z $(squeue -h 2>/dev/null) ]] && break; sleep 0.2; done
    fi
    local node
    for node in "${nodes[@]}"; do stop_pid "slurmd-$node"; done
    stop_pid slurmctld
    stop_pid slurmdbd
    stop_pid mysql
    stop_pid sshd
    forget_ssh
    pkill -x munged 2>/dev/null || true
    ours && rm -f /etc/slurm/slurm.conf /etc/slurm/slurmdbd.conf /etc/slurm/cgroup.conf
    rm -rf "$home"
    say "down"
}

[[ $(id -u) -eq 0 ]] || exec sudo -- "$0" "$@"
case "${1:-}" in
up) up ;;
down) down ;;
status) ours || fail "not up"; sinfo -N; squeue ;;
*) fail "up, down or status" ;;
esac
