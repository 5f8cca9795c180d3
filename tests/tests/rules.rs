//! Do rules find what they ask about in stock kernels? Judged by what the same kernel's types say of the structures alone. None is booted.

use std::collections::BTreeMap;
use std::sync::Arc;

use patcher::addr::Gva;
use patcher::edition::handler::{Choice, Region, Spec, assemble};
use patcher::edition::link::Returns;
use patcher::edition::set::Set;
use patcher::kernel::image::Image;
use patcher::kernel::payload::Payload;
use patcher::rule::Rule;
use patcher::rule::resolve::{Check, Function, PerCpu, Resolved, Source, Value};
use tests::stock;

fn load(kernel: stock::Stock) -> Image {
    let file = std::fs::read(kernel.file("vmlinuz")).expect("the kernel can be read");
    let vmlinux = Payload::unpack(&file).expect("it unpacks");
    Image::parse(Arc::new(vmlinux)).expect("it is a kernel")
}

fn resolve(image: &Image, function: &str, rule: &str) -> Result<Resolved, String> {
    let of = Function {
        image,
        types: image.types(),
        name: function,
        predicates: &BTreeMap::from([("asks".to_owned(), Gva(0xffff_ffff_ff91_0000))]),
    };
    let rule = Rule::parse(rule).map_err(|error| error.to_string())?;
    of.resolve(&rule).map_err(|error| error.to_string())
}

/// The value that a rule of one test looks at, and the first constant.
fn value(image: &Image, function: &str, rule: &str) -> (Value, u64) {
    match resolve(image, function, rule) {
        Ok(Resolved::Check(Check::Order { value, with, .. })) => (value, with),
        other => panic!("{function}, {rule}: {other:?}"),
    }
}

/// Function, rule, the argument it begins with, the members on the way, and what is found there: bytes, sign, constant.
type Case = (
    &'static str,
    &'static str,
    u8,
    &'static [(&'static str, &'static str)],
    u8,
    bool,
    u64,
);

const FIELDS: &[Case] = &[
    ("unix_ioctl", "cmd = 0x8905", 1, &[], 4, false, 0x8905),
    ("unix_ioctl", "arg2 = 0x8905", 1, &[], 4, false, 0x8905),
    ("unix_ioctl", "arg3 = 1", 2, &[], 8, false, 1),
    (
        "unix_ioctl",
        "sock->type = 2",
        0,
        &[("socket", "type")],
        2,
        true,
        2,
    ),
    (
        "unix_ioctl",
        "sock->type = SOCK_DGRAM",
        0,
        &[("socket", "type")],
        2,
        true,
        2,
    ),
    (
        "unix_ioctl",
        "sock->state = SS_CONNECTED",
        0,
        &[("socket", "state")],
        4,
        false,
        3,
    ),
    (
        "unix_ioctl",
        "arg1->sk->sk_protocol = 17",
        0,
        &[("socket", "sk"), ("sock", "sk_protocol")],
        2,
        false,
        17,
    ),
    (
        "unix_ioctl",
        "sock.sk.sk_socket.type = -1",
        0,
        &[("socket", "sk"), ("sock", "sk_socket"), ("socket", "type")],
        2,
        true,
        u64::MAX,
    ),
    (
        "unix_ioctl",
        "sock->sk->sk_receive_queue.qlen = 0",
        0,
        &[("socket", "sk"), ("sock", "sk_receive_queue.qlen")],
        4,
        false,
        0,
    ),
    ("vfs_read", "count > 4096", 2, &[], 8, false, 4096),
    (
        "vfs_read",
        "file->f_flags = 0",
        0,
        &[("file", "f_flags")],
        4,
        false,
        0,
    ),
    (
        "vfs_read",
        "file->f_inode->i_ino = 2",
        0,
        &[("file", "f_inode"), ("inode", "i_ino")],
        8,
        false,
        2,
    ),
    (
        "pipe_write",
        "iocb->ki_flags = 0",
        0,
        &[("kiocb", "ki_flags")],
        4,
        true,
        0,
    ),
    ("do_exit", "code = -1", 0, &[], 8, true, u64::MAX),
];

fn fields(image: &Image) {
    for (function, rule, argument, way, size, signed, with) in FIELDS {
        let offset = |(of, member): &(&str, &str)| {
            let offset = image.types().offset_of(of, member).expect(member);
            u32::try_from(offset).expect("members are near")
        };
        let want = Value {
            from: Source::Argument(*argument),
            loads: way.iter().map(offset).collect(),
            size: *size,
            signed: *signed,
            bits: None,
        };
        assert_eq!(
            value(image, function, rule),
            (want, *with),
            "{function}, {rule}"
        );
    }
}

/// A bit field is where its structure has it, in a word that is aligned.
fn bit_field(image: &Image) {
    let (found, _) = value(image, "unix_ioctl", "sock->sk->sk_no_check_tx = 1");
    let member = image
        .types()
        .member("sock", "sk_no_check_tx")
        .expect("it is there");
    let (first, count) = found.bits.expect("it is a bit field");
    let at = u64::from(found.loads[1]);
    assert_eq!(at % u64::from(found.size), 0);
    let (want_first, want_count) = member.bits.expect("it is a bit field");
    assert_eq!(
        (at * 8 + u64::from(first), count),
        (member.offset * 8 + u64::from(want_first), want_count)
    );
}

fn of_task(image: &Image) {
    let types = image.types();
    let of = |member| {
        u32::try_from(types.offset_of("task_struct", member).expect(member)).expect("near")
    };
    for (rule, loads, size) in [
        ("pid = 1", vec![of("pid")], 4),
        ("tgid = 1", vec![of("tgid")], 4),
        (
            "uid = 1",
            vec![
                of("cred"),
                u32::try_from(types.offset_of("cred", "uid").expect("uid")).expect("near"),
            ],
            4,
        ),
    ] {
        let (found, _) = value(image, "vfs_read", rule);
        assert_eq!(
            (found.from, found.loads, found.size),
            (Source::Task, loads, size),
            "{rule}"
        );
    }
    let symbols = image.symbols();
    let per_cpu = PerCpu::of(image, 0).expect("it is known");
    let at = |name: &str| match symbols.optional(name).expect("none or one") {
        Some(alone) => alone.address.0,
        None => {
            symbols.lookup("pcpu_hot").expect("either").address.0
                + types.offset_of("pcpu_hot", name).expect(name)
        }
    };
    let found = [per_cpu.current, per_cpu.cpu].map(i64::from);
    assert_eq!(
        found,
        [at("current_task"), at("cpu_number")].map(u64::cast_signed)
    );
}

fn refusals(image: &Image) {
    for (function, rule, want) in [
        (
            "no_such_function",
            "arg1 = 1",
            "no function no_such_function",
        ),
        (
            "vfs_read",
            "sock = 1",
            "no argument sock; it has file, buf, count, pos",
        ),
        ("vfs_read", "arg5 = 1", "no argument arg5"),
        ("vfs_read", "file->nothing = 1", "has no member nothing"),
        ("vfs_read", "file->f_path = 1", "not of 1, 2, 4 or 8 bytes"),
        ("vfs_read", "count->x = 1", "no pointer"),
        ("vfs_read", "file->f_inode->i_ino.x = 1", "no pointer"),
        (
            "vfs_read",
            "count = -1",
            "never -1: it is from 0 to 18446744073709551615",
        ),
        ("unix_ioctl", "cmd = 0x100000000", "from 0 to 4294967295"),
        (
            "unix_ioctl",
            "sock->type in SOCK_RAW..SOCK_STREAM",
            "in no range from 3 to 1",
        ),
        (
            "unix_ioctl",
            "sock->type = NOTHING_LIKE_IT",
            "no enumerator NOTHING_LIKE_IT",
        ),
        (
            "do_mmap",
            "populate = 1",
            "only the first six are in registers",
        ),
    ] {
        let error = resolve(image, function, rule).expect_err(rule);
        assert!(error.contains(want), "{function}, {rule}: {error}");
    }
}

/// A handler is made of every kind of test.
fn handler(image: &Image) {
    let rules = [
        "pid = 7 and not kthread",
        "comm = \"nginx\" and uid in 1000..1999 or cgroup in set web",
        "sock->sk->sk_protocol in {6, 17} and cmd = 0x8905",
        "share 10% and first 100 and rate 5/s and during night",
        "predicate asks",
    ];
    let resolved = rules.map(|rule| Some(resolve(image, "unix_ioctl", rule).expect(rule)));
    let choice = |rule| Choice {
        rule,
        to: Gva(0xffff_ffff_ff90_0000),
        counter: None,
    };
    let choices: Vec<Choice> = resolved.into_iter().chain([None]).map(choice).collect();
    let web = Set::new(Gva(0xffff_ffff_ffa1_0000), 6).expect("a set");
    let region = Region::new(Gva(0xffff_ffff_ff80_0040), Returns::Plain).expect("a region");
    let spec = Spec {
        region: &region,
        per_cpu: PerCpu::of(image, 0).expect("it is known"),
        cpus: 4,
        bound: None,
        choices: &choices,
        sets: &BTreeMap::from([("web".to_owned(), web.place())]),
        cells: Gva(0xffff_ffff_ffa0_0000),
    };
    let made = assemble(&spec, Gva(0xffff_ffff_ff80_1000)).expect("it assembles");
    assert!(made.bytes.len() < 1024, "{} bytes", made.bytes.len());
}

#[test]
fn rules_find_what_they_ask_about_in_stock_kernels() {
    for kernel in stock::ALL {
        let image = load(kernel);
        fields(&image);
        bit_field(&image);
        of_task(&image);
        refusals(&image);
        handler(&image);
    }
}
