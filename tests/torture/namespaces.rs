//! Network namespaces: each replica in one of its own, with one cable to the database and one to the clients, so that
//! what is cut is cut in the kernel and its retransmissions are real. They need root, and live in a network and a
//! mount namespace of the run's own: however the run ends, nothing of them is left.

use std::{
    net::{Ipv4Addr, SocketAddr},
    os::unix::process::CommandExt as _,
    process::Command,
};

/// Says to the harness that it is in namespaces of its own.
const INSIDE_NAMESPACES_VARIABLE: &str = "KEYWARD_TORTURE_INSIDE";
/// Nobody's address: frames to it are dropped.
const UNUSED_MAC: &str = "02:00:00:00:00:99";
const DATABASE_PORT: u16 = 5432;
const GRPC_PORT: u16 = 50051;
const ADMIN_PORT: u16 = 9090;

/// Begins this program again in namespaces of its own, where that works; else returns.
pub(crate) fn enter() {
    const NEW: [&str; 4] = ["--net", "--mount", "--propagation", "private"];
    let works = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
    let probe = "mkdir -p /run/netns && mount -t tmpfs none /run/netns && ip netns add probe && \
                 ip link add kwprobe type veth peer name db netns probe";
    if is_inside() || !works(Command::new("unshare").args(NEW).args(["sh", "-c", probe])) {
        return;
    }
    let program = std::env::current_exe().unwrap();
    let arguments = std::env::args_os().skip(1);
    // Returns only when it fails; then the proxies must do.
    let error = Command::new("unshare")
        .args(NEW)
        .arg(program)
        .args(arguments)
        .env(INSIDE_NAMESPACES_VARIABLE, "yes")
        .exec();
    println!("no namespaces: {error}");
}

fn is_inside() -> bool {
    std::env::var_os(INSIDE_NAMESPACES_VARIABLE).is_some()
}

fn ip(arguments: &str) {
    let output = Command::new("ip").args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The same, where it does not matter whether there was anything to do.
fn run_ignoring_errors(arguments: &str) {
    Command::new("ip").args(arguments.split(' ')).output().unwrap();
}

/// A replica's two cables.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NamespaceLinks {
    replica: usize,
}

impl NamespaceLinks {
    /// Lays those of every replica; None = this run has no namespaces.
    pub(crate) fn create_all(replicas: usize) -> Option<Vec<NamespaceLinks>> {
        if !is_inside() {
            return None;
        }
        ip("link set lo up");
        // A place for names that nobody outside sees.
        let mounted = Command::new("mount").args(["-t", "tmpfs", "none", "/run/netns"]).status().unwrap();
        assert!(mounted.success());
        Some((0..replicas).map(|replica| NamespaceLinks { replica }.create()).collect())
    }

    fn create(self) -> NamespaceLinks {
        let NamespaceLinks { replica: n } = self;
        ip(&format!("netns add r{n}"));
        ip(&format!("-n r{n} link set lo up"));
        for (cable, ours, theirs) in [("db", 1, 2), ("cl", 5, 6)] {
            // An earlier world of the same run may have left one.
            run_ignoring_errors(&format!("link del {cable}{n}"));
            ip(&format!("link add {cable}{n} type veth peer name {cable} netns r{n}"));
            ip(&format!("addr add 10.213.{n}.{ours}/30 dev {cable}{n}"));
            ip(&format!("-n r{n} addr add 10.213.{n}.{theirs}/30 dev {cable}"));
            ip(&format!("link set {cable}{n} up"));
            ip(&format!("-n r{n} link set {cable} up"));
        }
        self
    }

    fn address(self, host: u8, port: u16) -> SocketAddr {
        (Ipv4Addr::new(10, 213, u8::try_from(self.replica).unwrap(), host), port).into()
    }

    /// Where the replica finds the database.
    pub(crate) fn database(self) -> SocketAddr {
        self.address(1, DATABASE_PORT)
    }

    /// Where clients find the replica, and its admin pages.
    pub(crate) fn replica(self) -> (SocketAddr, SocketAddr) {
        (self.address(6, GRPC_PORT), self.address(6, ADMIN_PORT))
    }

    /// What runs a program at the far end.
    pub(crate) fn wrapper(self) -> Vec<String> {
        ["ip", "netns", "exec", &format!("r{}", self.replica)].map(str::to_owned).to_vec()
    }

    /// Cuts the cable to the database, or mends it: to the database, and from it.
    pub(crate) fn cut(self, there: bool, back: bool) {
        let NamespaceLinks { replica: n } = self;
        let (ours, theirs) = (self.database().ip(), self.address(2, 0).ip());
        let aim = |at: &str, address, device: &str, lost| match lost {
            true => {
                ip(&format!("{at}neigh replace {address} lladdr {UNUSED_MAC} dev {device} nud permanent"))
            }
            // It may not be there: then it is not lost either.
            false => run_ignoring_errors(&format!("{at}neigh del {address} dev {device}")),
        };
        aim(&format!("-n r{n} "), ours, "db", there);
        aim("", theirs, &format!("db{n}"), back);
    }

    /// Unplugs the cable to the clients, or plugs it in again.
    pub(crate) fn unplug_clients(self, unplugged: bool) {
        ip(&format!("link set cl{} {}", self.replica, if unplugged { "down" } else { "up" }));
    }
}
