//! The tc filters between an interface and its tap.
//!
//! Each end has an ingress qdisc, whose filters take packets before the
//! namespace's own stack sees them. The kernel needs `sch_ingress`, `act_mirred`,
//! `cls_u32` and `cls_bpf` for it, which Debian's has, and not `act_gact`,
//! `cls_flower` or `cls_matchall`, which smaller kernels lack.

use std::pin::pin;

use futures::TryStreamExt;
use futures::stream::StreamExt;
use libc::sock_filter;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionGeneric, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption,
};
use rtnetlink::packet_core::{
    DefaultNla, Emitable, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::{Error, Handle};

const INGRESS: u32 = 0xffff_0000;
const ETH_P_ALL: u16 = (libc::ETH_P_ALL as u16).to_be();

/// `linux/pkt_cls.h`: what a `bpf` filter is made of, and its answer for a drop.
const TCA_BPF_ACT: u16 = 1;
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;
const TC_ACT_SHOT: u32 = 2;

/// The index of the interface with this name.
///
/// # Errors
/// The kernel's; `RequestFailed` if there is none.
pub async fn index_of(netlink: &Handle, name: &str) -> Result<u32, Error> {
    let mut found = pin!(netlink.link().get().match_name(name.to_owned()).execute());
    let link = found.try_next().await?;
    link.map(|message| message.header.index).ok_or(Error::RequestFailed)
}

/// Sends what arrives at one interface out of another. A u32 filter without a
/// condition is used and not `matchall`, which fewer kernels have.
///
/// # Errors
/// The kernel's.
pub async fn redirect(netlink: &Handle, from: u32, to: u32) -> Result<(), Error> {
    let from = from.cast_signed();
    netlink.qdisc().add(from).ingress().execute().await?;
    netlink.traffic_filter(from).add().parent(INGRESS).protocol(ETH_P_ALL).redirect(to)?.execute().await
}

/// Sends what arrives at one interface and what `program` accepts out of
/// another, and drops the rest.
///
/// # Errors
/// The kernel's.
pub async fn redirect_accepted(
    netlink: &Handle,
    from: u32,
    to: u32,
    program: &[sock_filter],
) -> Result<(), Error> {
    netlink.qdisc().add(from.cast_signed()).ingress().execute().await?;
    // The drop comes first: there is no moment without it.
    let drop_all = sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: TC_ACT_SHOT };
    let mut drop_rest = bpf(&[drop_all]);
    drop_rest.push(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction));
    add(netlink, from, 2, drop_rest).await?;
    let mut accepted = bpf(program);
    accepted.push(other(TCA_BPF_ACT, bytes_of(&vec![redirection(to)])));
    add(netlink, from, 1, accepted).await
}

fn bpf(program: &[sock_filter]) -> Vec<TcFilterBpfOption> {
    let length = u16::try_from(program.len()).unwrap_or(u16::MAX);
    let mut code = Vec::with_capacity(size_of_val(program));
    for instruction in program {
        code.extend(instruction.code.to_ne_bytes());
        code.extend([instruction.jt, instruction.jf]);
        code.extend(instruction.k.to_ne_bytes());
    }
    vec![other(TCA_BPF_OPS_LEN, length.to_ne_bytes().into()), other(TCA_BPF_OPS, code)]
}

fn other(kind: u16, value: Vec<u8>) -> TcFilterBpfOption {
    TcFilterBpfOption::Other(DefaultNla::new(kind, value))
}

fn redirection(to: u32) -> TcAction {
    let mut generic = TcActionGeneric::default();
    generic.action = TcActionType::Stolen;
    let mut mirror = TcMirror::default();
    mirror.generic = generic;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    action
}

fn bytes_of(actions: &Vec<TcAction>) -> Vec<u8> {
    let mut bytes = vec![0; actions.as_slice().buffer_len()];
    actions.as_slice().emit(&mut bytes);
    bytes
}

/// Adds a `bpf` filter for packets of all protocols that arrive at an interface.
async fn add(
    netlink: &Handle,
    interface: u32,
    priority: u16,
    options: Vec<TcFilterBpfOption>,
) -> Result<(), Error> {
    let mut message = TcMessage::with_index(interface.cast_signed());
    message.header.parent = INGRESS.into();
    message.header.info = TcHandle { major: priority, minor: ETH_P_ALL }.into();
    message.attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
        TcAttribute::Options(options.into_iter().map(TcOption::Bpf).collect()),
    ];
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::NewTrafficFilter(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_EXCL | NLM_F_CREATE;
    let mut answers = pin!(netlink.clone().request(request)?);
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload {
            return Err(Error::NetlinkError(error));
        }
    }
    Ok(())
}
