//! Guards of devices on kernels without tcx: classic tc filters.
//!
//! They stay when the agent ends. A device that changes its namespace loses them, and whoever may
//! change the device can remove them: then the third guard, on the host's side, drops what comes.

use aya::programs::{
    ProgramError, SchedClassifier,
    links::Link as _,
    tc::{
        NlOptions, SchedClassifierLink, TcAttachOptions, TcAttachType, TcError, TcHandle,
        qdisc_add_clsact,
    },
};
use nix::libc::{EINVAL, ENOENT};

/// The first place. The handle tells ours from others' filters of the same priority, which run in
/// the order in which they came.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0x6e6d, 1);

/// What the kernel answers where there is no such filter, and where there is no qdisc at all.
const NOTHING_THERE: [i32; 2] = [ENOENT, EINVAL];

/// Attaches a program to a device of the calling thread's network namespace, in the place of an
/// earlier agent's if there is one.
pub(super) fn attach(
    program: &mut SchedClassifier,
    device: &str,
    direction: TcAttachType,
) -> Result<(), ProgramError> {
    let earlier = SchedClassifierLink::attached(device, direction, PRIORITY, HANDLE, None)
        .map_err(TcError::IoError)?;
    let id = program.attach_to_link(earlier).or_else(|_none| {
        // If it is there already this fails and nothing is lost; if it cannot be, attaching tells.
        let _there = qdisc_add_clsact(device);
        let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
        program.attach_with_options(device, direction, TcAttachOptions::Netlink(options))
    })?;
    // Dropped it would be detached.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Takes our filter from a device of the calling thread's network namespace, if it is there. The
/// qdisc stays: somebody else may have filters there.
pub(super) fn detach(device: &str, direction: TcAttachType) -> Result<(), ProgramError> {
    let ours = SchedClassifierLink::attached(device, direction, PRIORITY, HANDLE, None)
        .map_err(TcError::IoError)?;
    match ours.detach() {
        Err(ProgramError::NetlinkError(error))
            if error.raw_os_error().is_some_and(|code| NOTHING_THERE.contains(&code)) =>
        {
            Ok(())
        }
        done => done,
    }
}
