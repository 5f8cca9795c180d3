//! What is asked for in words, and views as people read them.

use patcher::addr::Gva;
use serde::de::DeserializeOwned;

use super::stack::{Doubt, FrameKind, Stack, StackEnd, StackFrame, Stacks};
use super::symbols::{Symbol, SymbolAt, SymbolList, SymbolSpace, Symbols};
use super::tasks::{Task, Tasks};
use super::text::{Text, TextCount};
use super::types::{TypeLayouts, TypeMember, Types};
use super::{Seen, Shown, View, disasm, stack};

#[test]
fn whose_stack_is_told_by_a_word() {
    let check = |text: &str, want: Option<stack::Asked>| {
        let asked = stack::Asked::parse(text);
        assert_eq!(asked.as_ref().ok().copied(), want, "{text}");
        assert!(asked.is_err() || asked.unwrap().to_string() == text);
    };
    check("1", Some(stack::Asked::Task(1)));
    check("cpu12", Some(stack::Asked::Cpu(12)));
    check("all", Some(stack::Asked::All));
    for wrong in ["", "cpu", "cpu-1", "+1", "1x", "99999999999", "All"] {
        check(wrong, None);
    }
}

#[test]
fn a_place_in_code_is_told_by_a_word() {
    use disasm::Where::{Address, Name};
    let check = |text: &str, want: Option<disasm::Where>| {
        let asked = disasm::Asked::parse(text, None);
        assert_eq!(asked.ok().map(|asked| asked.of), want, "{text}");
    };
    check("f", Some(Name("f".to_owned(), 0)));
    check("f.cold+0x1f", Some(Name("f.cold".to_owned(), 31)));
    check("f+31", Some(Name("f".to_owned(), 31)));
    let text = Gva(0xffff_ffff_8100_0000);
    check("0xffffffff81000000", Some(Address(text)));
    check("ffffffff81000000", Some(Address(text)));
    for wrong in ["", "f+", "f+x", "f+-1", "f+0x", "+1+", "0x+1"] {
        check(wrong, None);
    }
}

#[test]
fn stacks_are_shown_with_their_verdict() {
    let frame = |kind, place: Option<&str>| StackFrame {
        address: "0x10".to_owned(),
        kind,
        slot: None,
        place: place.map(str::to_owned),
    };
    let runs = Stack {
        cpu: Some(1),
        pid: Some(7),
        name: Some("a\u{1b}b".to_owned()),
        reliable: true,
        ends: Some(StackEnd::User),
        unreliable: None,
        frames: vec![
            frame(FrameKind::Runs, Some("f+0x1/0x2 [m]")),
            frame(FrameKind::Interrupted, None),
            frame(FrameKind::Call, Some("g+0x3/0x4")),
        ],
    };
    let doubtful = Stack {
        cpu: None,
        pid: None,
        name: None,
        reliable: false,
        ends: None,
        unreliable: Some(Doubt {
            reason: "no known task is on this stack".to_owned(),
            address: None,
            place: None,
            stack_pointer: "0x20".to_owned(),
        }),
        frames: Vec::new(),
    };
    let shown = Stacks {
        stacks: vec![runs, doubtful],
        reliable: 1,
        unreliable: 1,
    };
    let want = "\
task 7 (a\\u{1b}b) on vCPU 1
  0x10  f+0x1/0x2 [m]  runs here
  0x10  -  interrupted here
  0x10  g+0x3/0x4
  reliable, to the user's registers

no known task
  unreliable: no known task is on this stack, at stack pointer 0x20

2 stacks: 1 reliable, 1 unreliable
";
    assert_eq!(shown.table(), want);
}

/// A thread of the kernel, of which all is known; a process, of which nothing but what every kernel says; and a process's thread.
fn tasks() -> Tasks {
    let bare = Task {
        pid: 7,
        tgid: None,
        ppid: None,
        state: None,
        uid: None,
        kthread: None,
        name: "a".to_owned(),
        cpu: Some(0),
        address: "0x20".to_owned(),
        stack: None,
        saved_sp: None,
    };
    let thread = Task {
        pid: 2,
        tgid: Some(2),
        ppid: Some(0),
        state: Some('I'),
        uid: Some(0),
        kthread: Some(true),
        name: "kthreadd".to_owned(),
        cpu: None,
        saved_sp: Some("0x1000".to_owned()),
        ..bare.clone()
    };
    let user = Task {
        pid: 9,
        tgid: Some(8),
        ppid: Some(1),
        state: Some('t'),
        uid: Some(1000),
        kthread: Some(false),
        ..bare.clone()
    };
    Tasks {
        tasks: vec![thread, bare, user],
        cpus: Vec::new(),
        unowned_stacks: Vec::new(),
    }
}

#[test]
fn tasks_are_shown_as_people_list_processes() {
    let want = "\
PID  TGID  PPID   UID  STATE  CPU  TASK  STACK  SAVED SP  NAME
  2     2     0     0  I        -  0x20      -    0x1000  [kthreadd]
  7     -     -     -  -        0  0x20      -         -  a
  9     8     1  1000  t        0  0x20      -         -  a
";
    assert_eq!(tasks().table(), want);
}

/// What the API sends of `view` is what its client gets.
fn round<T: DeserializeOwned>(view: &View, form: fn(T) -> View) {
    for paused_us in [None, Some(3)] {
        let seen = Seen {
            paused_us,
            view: view.clone(),
        };
        let json = serde_json::to_string(&seen).unwrap();
        let got: Seen<T> = serde_json::from_str(&json).unwrap();
        assert_eq!(got.map(form), seen, "{json}");
    }
}

#[test]
fn views_come_through_as_they_were_sent() {
    let symbol = Symbol {
        name: "f".to_owned(),
        address: "0x10".to_owned(),
        space: SymbolSpace::PerCpu,
        kind: 't',
        size: 1,
        module: None,
        position: Some(2),
        before: None,
        after: Some("g".to_owned()),
        cpus: Vec::new(),
    };
    for name in [None, Some("f".to_owned())] {
        let symbols = vec![symbol.clone()];
        let list = SymbolList { name, symbols };
        round(&View::Symbols(Symbols::List(list)), View::Symbols);
    }
    let at = SymbolAt {
        address: "0x11".to_owned(),
        symbol: "f".to_owned(),
        offset: 1,
        size: u64::MAX,
        module: Some("m".to_owned()),
        cpu: None,
    };
    round(&View::Symbols(Symbols::At(at)), View::Symbols);
    let layouts = TypeLayouts {
        name: "t".to_owned(),
        layouts: Vec::new(),
    };
    round(&View::Types(Types::Layouts(layouts)), View::Types);
    let member = TypeMember {
        name: "t".to_owned(),
        member: "a.b".to_owned(),
        offset: 8,
        size: 4,
        first_bit: Some(1),
        bits: Some(2),
    };
    round(&View::Types(Types::Member(member)), View::Types);
    round(&View::Tasks(tasks()), View::Tasks);
    let count = TextCount {
        places: 1,
        bytes: 5,
    };
    let text = Text {
        compared: 9,
        causes: [("ours".to_owned(), count)].into(),
        differences: Vec::new(),
    };
    round(&View::Text(text), View::Text);
}

#[test]
fn text_is_explained_unless_a_difference_has_no_cause() {
    let seen = |cause: &str| {
        let count = TextCount {
            places: 1,
            bytes: 5,
        };
        View::Text(Text {
            compared: 16,
            causes: [(cause.to_owned(), count)].into(),
            differences: Vec::new(),
        })
    };
    assert!(seen("fentry").is_explained());
    assert!(!seen("unexplained").is_explained());
}
