use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use husk_vmm_api::RateLimit;
use proptest::prelude::*;
use virtio_bindings::virtio_blk as vb;
use virtio_bindings::virtio_ring::VRING_DESC_F_WRITE;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::device::QUEUE_SIZE;
use super::persist::BlockRestoreError;
use super::request::{Buffer, Malformed, Operation, Request};
use super::*;
use crate::devices::virtio::buffers::MAX_SEGMENTS;
use crate::devices::virtio::device::{Activation, VirtioDevice};
use crate::devices::virtio::interrupt::{CONFIG_CHANGE, Interrupt, USED_RING};
use crate::devices::virtio::rate::Limiter;
use crate::devices::virtio::test_utils::{self, DriverQueue, Part};

const RING: GuestAddress = GuestAddress(0x1000);
const HEADER: u64 = 0x8000;
const DATA: u64 = 0x10000;
const STATUS: u64 = 0x9000;
const OK: u8 = vb::VIRTIO_BLK_S_OK as u8;
const IOERR: u8 = vb::VIRTIO_BLK_S_IOERR as u8;
const UNSUPP: u8 = vb::VIRTIO_BLK_S_UNSUPP as u8;

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap()
}

fn disk_file(sectors: u64) -> File {
    let mut file = tempfile::tempfile().unwrap();
    for sector in 0..sectors {
        file.write_all(&[sector as u8 + 1; 512]).unwrap();
    }
    file
}

fn fd(file: &File) -> OwnedFd {
    file.try_clone().unwrap().into()
}

/// Descriptors as (address, length, writable), which the mock chains.
fn chain(descriptors: &[(u64, u32, bool)]) -> Vec<RawDescriptor> {
    let flags = |writable: bool| if writable { VRING_DESC_F_WRITE as u16 } else { 0 };
    descriptors
        .iter()
        .map(|&(address, length, writable)| {
            RawDescriptor::from(Descriptor::new(address, length, flags(writable), 0))
        })
        .collect()
}

fn put_header(memory: &GuestMemoryMmap, kind: u32, sector: u64) {
    memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
    memory.write_obj(0u32, GuestAddress(HEADER + 4)).unwrap();
    memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
}

fn parse(memory: &GuestMemoryMmap, descriptors: &[(u64, u32, bool)]) -> Result<Request, Malformed> {
    let mock = MockSplitQueue::create(memory, RING, 16);
    Request::parse(mock.build_desc_chain(&chain(descriptors)).unwrap())
}

mod requests {
    use super::*;

    #[test]
    fn a_read_as_linux_writes_it() {
        let memory = memory();
        put_header(&memory, vb::VIRTIO_BLK_T_IN, 7);
        let request = parse(
            &memory,
            &[(HEADER, 16, false), (DATA, 4096, true), (DATA + 8192, 512, true), (STATUS, 1, true)],
        )
        .unwrap();
        assert_eq!(request.operation, Operation::Read(7));
        assert_eq!(
            request.output,
            [
                Buffer { address: GuestAddress(DATA), length: 4096 },
                Buffer { address: GuestAddress(DATA + 8192), length: 512 },
            ]
        );
        assert_eq!((request.input.len(), request.status), (0, GuestAddress(STATUS)));
    }

    #[test]
    fn how_a_request_is_cut_into_buffers_does_not_matter() {
        let memory = memory();
        put_header(&memory, vb::VIRTIO_BLK_T_OUT, 1 << 40);
        memory.write_slice(&[0xaa; 100], GuestAddress(HEADER + 16)).unwrap();
        let request =
            parse(&memory, &[(HEADER, 3, false), (HEADER + 3, 113, false), (STATUS, 1, true)]).unwrap();
        assert_eq!(request.operation, Operation::Write(1 << 40));
        assert_eq!(request.input, [Buffer { address: GuestAddress(HEADER + 16), length: 100 }]);

        put_header(&memory, vb::VIRTIO_BLK_T_IN, 0);
        let request = parse(&memory, &[(HEADER, 16, false), (DATA, 513, true)]).unwrap();
        assert_eq!(request.output, [Buffer { address: GuestAddress(DATA), length: 512 }]);
        assert_eq!(request.status, GuestAddress(DATA + 512));
    }

    #[test]
    fn a_request_has_a_bounded_number_of_buffers() {
        // The chain is in an indirect table, which may have up to 2^16 entries.
        let memory = test_utils::memory();
        let mut driver = DriverQueue::new(&memory, 0, 16);
        let mut queue = driver.queue();
        let parts: Vec<_> = std::iter::once(Part::readable(0x10_0000, 16))
            .chain(std::iter::repeat_n(Part::writable(0x10_1000, 1), 60_000))
            .collect();
        driver.add_indirect(0x20_0000, &parts[..MAX_SEGMENTS]);
        driver.add_indirect(0x40_0000, &parts);
        let mut next = || Request::parse(queue.pop_descriptor_chain(&memory).unwrap());
        assert_eq!(next().unwrap().output.len(), MAX_SEGMENTS - 2);
        assert_eq!(next().unwrap_err(), Malformed::TooLong);
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let memory = memory();
        put_header(&memory, vb::VIRTIO_BLK_T_IN, 0);
        let refused = |descriptors: &[(u64, u32, bool)]| parse(&memory, descriptors).unwrap_err();
        assert_eq!(refused(&[(HEADER, 15, false), (STATUS, 1, true)]), Malformed::NoHeader);
        assert_eq!(refused(&[(STATUS, 1, true)]), Malformed::NoHeader);
        assert_eq!(refused(&[(HEADER, 16, false)]), Malformed::NoStatus);
        assert_eq!(refused(&[(HEADER, 16, false), (STATUS, 0, true)]), Malformed::NoStatus);
        assert_eq!(refused(&[(STATUS, 1, true), (HEADER, 16, false)]), Malformed::Order);
        assert_eq!(refused(&[(HEADER, 16, false), (0xf_ffff, 2, true)]), Malformed::OutsideMemory);
        assert_eq!(refused(&[(u64::MAX, 16, false), (STATUS, 1, true)]), Malformed::OutsideMemory);
    }

    proptest! {
        #[test]
        fn any_chain_is_a_request_within_memory_or_refused(
            descriptors in prop::collection::vec(
                (prop_oneof![0u64..0x11_0000, any::<u64>()], prop_oneof![0u32..5000, any::<u32>()], any::<bool>()),
                1..10,
            ),
            bytes in prop::collection::vec(any::<u8>(), 16),
        ) {
            let memory = memory();
            memory.write_slice(&bytes, GuestAddress(HEADER)).unwrap();
            if let Ok(request) = parse(&memory, &descriptors) {
                let disk = Disk::new(fd(&disk_file(4)), false).unwrap();
                let outcome = disk.execute(&request, &memory, &[0; SERIAL_LENGTH], &|| {});
                prop_assert!([OK, IOERR, UNSUPP].contains(&outcome.status));
                for buffer in request.input.iter().chain(&request.output) {
                    prop_assert!(buffer.length > 0 && buffer.address.0 + u64::from(buffer.length) <= 1 << 20);
                }
            }
        }
    }
}

mod disks {
    use super::*;

    fn run(disk: &Disk, memory: &GuestMemoryMmap, kind: u32, sector: u64, data: (u32, bool)) -> (u8, u32) {
        put_header(memory, kind, sector);
        let mut descriptors = vec![(HEADER, 16, false)];
        if data.0 > 0 {
            descriptors.push((DATA, data.0, data.1));
        }
        descriptors.push((STATUS, 1, true));
        let request = parse(memory, &descriptors).unwrap();
        let outcome = disk.execute(&request, memory, b"serial-number-20-lon", &|| {});
        (outcome.status, outcome.written)
    }

    #[test]
    fn data_moves_between_file_and_memory() {
        let (memory, file) = (memory(), disk_file(8));
        let disk = Disk::new(fd(&file), false).unwrap();
        assert_eq!(run(&disk, &memory, vb::VIRTIO_BLK_T_IN, 6, (1024, true)), (OK, 1024));
        let mut got = [0; 1024];
        memory.read_slice(&mut got, GuestAddress(DATA)).unwrap();
        assert_eq!((got[0], got[512], got[1023]), (7, 8, 8));

        memory.write_slice(&[0x55; 512], GuestAddress(DATA)).unwrap();
        assert_eq!(run(&disk, &memory, vb::VIRTIO_BLK_T_OUT, 3, (512, false)), (OK, 0));
        let mut got = [0; 512];
        file.read_exact_at(&mut got, 3 * 512).unwrap();
        assert_eq!(got, [0x55; 512]);
        assert_eq!(run(&disk, &memory, vb::VIRTIO_BLK_T_FLUSH, 0, (0, false)), (OK, 0));
    }

    #[test]
    fn nothing_reaches_beyond_the_end() {
        let (memory, file) = (memory(), disk_file(4));
        let disk = Disk::new(fd(&file), false).unwrap();
        for (sector, length) in [(4, 512), (3, 1024), (u64::MAX, 512), (u64::MAX / 512, 1024), (0, 511)] {
            assert_eq!(run(&disk, &memory, vb::VIRTIO_BLK_T_IN, sector, (length, true)), (IOERR, 0));
            assert_eq!(run(&disk, &memory, vb::VIRTIO_BLK_T_OUT, sector, (length, false)), (IOERR, 0));
        }
        assert_eq!(file.metadata().unwrap().len(), 4 * 512);
    }

    #[test]
    fn a_file_that_shrank_is_an_error_and_not_a_hang() {
        let (memory, file) = (memory(), disk_file(4));
        let disk = Disk::new(fd(&file), false).unwrap();
        file.set_len(512).unwrap();
        assert_eq!(run(&disk, &memory, vb::VIRTIO_BLK_T_IN, 0, (2048, true)), (IOERR, 0));
    }

    #[test]
    fn a_read_only_disk_stays_as_it_is() {
        let (memory, file) = (memory(), disk_file(4));
        let disk = Disk::new(fd(&file), true).unwrap();
        assert_eq!(run(&disk, &memory, vb::VIRTIO_BLK_T_OUT, 0, (512, false)), (IOERR, 0));
        put_range(&memory, 0, 1, 0);
        assert_eq!(run(&disk, &memory, vb::VIRTIO_BLK_T_DISCARD, 0, (16, false)), (IOERR, 0));
        assert_eq!(run(&disk, &memory, vb::VIRTIO_BLK_T_IN, 0, (512, true)), (OK, 512));
        let got: u8 = memory.read_obj(GuestAddress(DATA)).unwrap();
        assert_eq!(got, 1);
    }

    #[test]
    fn the_serial_number_needs_its_room() {
        let memory = memory();
        let disk = Disk::new(fd(&disk_file(1)), false).unwrap();
        assert_eq!(run(&disk, &memory, vb::VIRTIO_BLK_T_GET_ID, 0, (20, true)), (OK, 20));
        let mut got = [0; 20];
        memory.read_slice(&mut got, GuestAddress(DATA)).unwrap();
        assert_eq!(&got, b"serial-number-20-lon");
        assert_eq!(run(&disk, &memory, vb::VIRTIO_BLK_T_GET_ID, 0, (19, true)), (IOERR, 0));
    }

    fn put_range(memory: &GuestMemoryMmap, sector: u64, sectors: u32, flags: u32) {
        memory.write_obj(sector, GuestAddress(DATA)).unwrap();
        memory.write_obj(sectors, GuestAddress(DATA + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(DATA + 12)).unwrap();
    }

    #[test]
    fn discarded_and_zeroed_ranges_read_as_zero() {
        for kind in [vb::VIRTIO_BLK_T_DISCARD, vb::VIRTIO_BLK_T_WRITE_ZEROES] {
            let (memory, file) = (memory(), disk_file(8));
            let disk = Disk::new(fd(&file), false).unwrap();
            put_range(&memory, 2, 3, 0);
            assert_eq!(run(&disk, &memory, kind, 0, (16, false)), (OK, 0));
            let mut content = [0; 8 * 512];
            file.read_exact_at(&mut content, 0).unwrap();
            let sectors: Vec<u8> = content.chunks(512).map(|sector| sector[0]).collect();
            assert_eq!(sectors, [1, 2, 0, 0, 0, 6, 7, 8]);
        }
    }

    #[test]
    fn ranges_that_cannot_be_are_refused() {
        let (memory, file) = (memory(), disk_file(4));
        let disk = Disk::new(fd(&file), false).unwrap();
        let kind = vb::VIRTIO_BLK_T_WRITE_ZEROES;
        for (sector, sectors, flags, expected) in
            [(3, 2, 0, IOERR), (u64::MAX, 1, 0, IOERR), (0, u32::MAX, 0, IOERR), (0, 1, 2, UNSUPP)]
        {
            put_range(&memory, sector, sectors, flags);
            assert_eq!(run(&disk, &memory, kind, 0, (16, false)), (expected, 0));
        }
        assert_eq!(run(&disk, &memory, kind, 0, (15, false)), (IOERR, 0));
        assert_eq!(run(&disk, &memory, kind, 0, (17 * 16, false)), (IOERR, 0));
        assert_eq!(run(&disk, &memory, 99, 0, (0, false)), (UNSUPP, 0));
    }
}

mod devices {
    use super::*;

    /// A device, and a driver that uses it.
    struct Setup {
        memory: GuestMemoryMmap,
        block: Arc<Mutex<Block>>,
        interrupt: Arc<Interrupt>,
        notification: EventFd,
    }

    impl Setup {
        fn new(block: Arc<Mutex<Block>>) -> Self {
            let memory = memory();
            let interrupt = Arc::new(Interrupt::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()));
            let notification = EventFd::new(libc::EFD_NONBLOCK).unwrap();
            let setup = Self { memory, block, interrupt, notification };
            setup.activate();
            setup
        }

        fn activate(&self) {
            let queue: Queue = MockSplitQueue::create(&self.memory, RING, QUEUE_SIZE).create_queue().unwrap();
            self.block
                .lock()
                .unwrap()
                .activate(Activation {
                    memory: self.memory.clone(),
                    queues: vec![queue],
                    queue_events: vec![self.notification.try_clone().unwrap()],
                    interrupt: Arc::clone(&self.interrupt),
                    features: 0,
                })
                .unwrap();
        }

        /// Offers chains of read requests of one sector each, and notifies.
        fn read_sectors(&self, sectors: &[u64]) {
            self.ask(&sectors.iter().map(|sector| (vb::VIRTIO_BLK_T_IN, *sector)).collect::<Vec<_>>());
        }

        /// Offers chains of requests, by their types and sectors, and notifies.
        fn ask(&self, requests: &[(u32, u64)]) {
            let mock = MockSplitQueue::create(&self.memory, RING, QUEUE_SIZE);
            let mut descriptors = Vec::new();
            for (index, (kind, sector)) in requests.iter().enumerate() {
                let index = index as u64;
                let header = HEADER + 16 * index;
                self.memory.write_obj(*kind, GuestAddress(header)).unwrap();
                self.memory.write_obj(*sector, GuestAddress(header + 8)).unwrap();
                self.memory.write_obj(0xffu8, GuestAddress(STATUS + index)).unwrap();
                for (place, (address, length, flags)) in
                    [(header, 16, 1u16), (DATA + 512 * index, 512, 3), (STATUS + index, 1, 2)]
                        .into_iter()
                        .enumerate()
                {
                    let next = (3 * index + place as u64 + 1) as u16;
                    descriptors.push(RawDescriptor::from(Descriptor::new(address, length, flags, next)));
                }
            }
            mock.build_multiple_desc_chains(&descriptors).unwrap();
            self.notification.write(1).unwrap();
        }

        /// The index of the used ring, which the driver reads.
        fn used(&self) -> u16 {
            let queue = MockSplitQueue::new(&self.memory, QUEUE_SIZE);
            let offset = queue.used_addr().0 - queue.start().0;
            self.memory.read_obj(GuestAddress(RING.0 + offset + 2)).unwrap()
        }

        fn wait_used(&self, count: u16) {
            let deadline = Instant::now() + Duration::from_secs(10);
            while self.used() < count {
                assert!(Instant::now() < deadline, "{} of {count} requests came back", self.used());
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn with_disk(sectors: u64) -> Arc<Mutex<Block>> {
        let disk = Disk::new(fd(&disk_file(sectors)), false).unwrap();
        Block::with_disk("disk-0", disk, IoPool::new().unwrap()).unwrap()
    }

    fn capacity(block: &Mutex<Block>) -> u64 {
        let mut capacity = [0; 8];
        block.lock().unwrap().read_config(0, &mut capacity);
        u64::from_le_bytes(capacity)
    }

    #[test]
    fn requests_are_served_and_announced() {
        let setup = Setup::new(with_disk(20));
        setup.read_sectors(&[3, 0, 19, 20]);
        setup.wait_used(4);
        let first: Vec<u8> =
            (0..3).map(|i| setup.memory.read_obj(GuestAddress(DATA + 512 * i)).unwrap()).collect();
        assert_eq!(first, [4, 1, 20]);
        let statuses: [u8; 4] = setup.memory.read_obj::<u32>(GuestAddress(STATUS)).unwrap().to_le_bytes();
        assert_eq!(statuses, [OK, OK, OK, IOERR]);
        assert_eq!(setup.interrupt.status(), USED_RING);
        assert!(setup.interrupt.line().read().unwrap() >= 1);
    }

    #[test]
    fn a_limit_lets_requests_wait_and_answers_them_all() {
        let limit = RateLimit { operations_per_second: 50, operations_burst: 2, ..RateLimit::default() };
        let block = with_disk(4);
        block.lock().unwrap().limit(Limiter::new(Some(&limit)), None).unwrap();
        let start = Instant::now();
        let setup = Setup::new(block);
        setup.read_sectors(&[0, 1, 2, 3, 0, 1]);
        setup.wait_used(6);
        // Four of them waited, the last one for 80 ms.
        assert!(start.elapsed() >= Duration::from_millis(79), "{:?}", start.elapsed());
        // A reset takes the timer out of the pool, and a new driver is served.
        setup.block.lock().unwrap().reset();
        setup.activate();
    }

    #[test]
    fn flushes_wait_for_their_own_limit_and_are_all_answered() {
        let limit = RateLimit { operations_per_second: 50, operations_burst: 1, ..RateLimit::default() };
        let block = with_disk(4);
        block.lock().unwrap().limit(None, Limiter::new(Some(&limit))).unwrap();
        let setup = Setup::new(block);
        let start = Instant::now();
        setup.ask(&[(vb::VIRTIO_BLK_T_IN, 0), (vb::VIRTIO_BLK_T_FLUSH, 0), (vb::VIRTIO_BLK_T_IN, 1)]);
        setup.wait_used(3);
        assert!(start.elapsed() < Duration::from_secs(10));
        setup.block.lock().unwrap().reset();
        setup.activate();
        let start = Instant::now();
        setup.ask(&[(vb::VIRTIO_BLK_T_FLUSH, 0); 4]);
        setup.wait_used(4);
        assert!(start.elapsed() >= Duration::from_millis(59), "{:?}", start.elapsed());
    }

    #[test]
    fn a_reset_device_leaves_memory_alone_and_can_start_again() {
        let setup = Setup::new(with_disk(4));
        setup.block.lock().unwrap().reset();
        setup.read_sectors(&[1]);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(setup.used(), 0);
        assert!(setup.block.lock().unwrap().activation().is_none());
        setup.activate();
        setup.read_sectors(&[1]);
        setup.wait_used(1);
    }

    #[test]
    fn a_queue_that_was_not_set_up_is_refused() {
        let block = with_disk(4);
        let result = block.lock().unwrap().activate(Activation {
            memory: memory(),
            queues: vec![Queue::new(QUEUE_SIZE).unwrap()],
            queue_events: vec![EventFd::new(libc::EFD_NONBLOCK).unwrap()],
            interrupt: Arc::new(Interrupt::new(EventFd::new(0).unwrap())),
            features: 0,
        });
        assert!(result.is_err());
    }

    #[test]
    fn a_slot_tells_its_driver_when_a_disk_comes_and_goes() {
        let setup = Setup::new(Block::slot("image-0", IoPool::new().unwrap()).unwrap());
        assert_eq!(capacity(&setup.block), 0);
        setup.read_sectors(&[0]);
        setup.wait_used(1);
        assert_eq!(setup.memory.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), IOERR);
        setup.interrupt.acknowledge(USED_RING);

        let disk = || Disk::new(fd(&disk_file(9)), true).unwrap();
        setup.block.lock().unwrap().attach(disk()).unwrap();
        assert_eq!((capacity(&setup.block), setup.interrupt.status()), (9, CONFIG_CHANGE));
        assert!(matches!(setup.block.lock().unwrap().attach(disk()), Err(BlockError::Occupied(_))));
        setup.block.lock().unwrap().detach().unwrap();
        assert_eq!(capacity(&setup.block), 0);
        assert!(matches!(setup.block.lock().unwrap().detach(), Err(BlockError::Empty(_))));
    }

    #[test]
    fn a_fixed_disk_stays() {
        let block = with_disk(4);
        assert!(matches!(block.lock().unwrap().detach(), Err(BlockError::NotASlot(_))));
    }

    #[test]
    fn serial_numbers_are_short_ascii() {
        let slot = |serial: &str| Block::slot(serial, IoPool::new().unwrap());
        for serial in ["", "with space", "späti", "123456789012345678901"] {
            assert!(matches!(slot(serial), Err(BlockError::Serial(_))), "{serial}");
        }
        assert_eq!(slot("12345678901234567890").unwrap().lock().unwrap().serial(), "12345678901234567890");
    }

    #[test]
    fn a_restored_device_is_the_saved_one() {
        let pool = IoPool::new().unwrap();
        let block = with_disk(4);
        let saved = block.lock().unwrap().save();
        let disk = |sectors| Some(Disk::new(fd(&disk_file(sectors)), false).unwrap());
        let twin = Block::restore(&saved, disk(4), pool.clone(), [None, None]).unwrap();
        assert_eq!(twin.lock().unwrap().save(), saved);
        assert_eq!(twin.lock().unwrap().features(), block.lock().unwrap().features());
        for wrong in [None, disk(5)] {
            assert!(matches!(
                Block::restore(&saved, wrong, pool.clone(), [None, None]),
                Err(BlockRestoreError::Disk { .. })
            ));
        }
        let slot = Block::slot("s", pool.clone()).unwrap().lock().unwrap().save();
        let filled = Block::restore(&slot, disk(7), pool, [None, None]).unwrap();
        assert_eq!(capacity(&filled), 7);
    }
}
