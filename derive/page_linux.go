package derive

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// sizeSeals keep a page from shrinking under the one who has it mapped.
const sizeSeals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW

// NewPage makes an empty secret page: memfd_secret, or where the kernel has none a memfd whose size is sealed. The caller
// closes it. It is not inherited over exec unless it is passed on.
func NewPage() (*os.File, error) {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err != nil {
		return newMemfdPage()
	}
	f := os.NewFile(uintptr(fd), "keybroker secret page")
	if err := unix.Ftruncate(fd, pageSize); err != nil {
		return nil, errors.Join(fmt.Errorf("sizing a secret page: %w", err), f.Close())
	}
	// The kernel takes secret memory from what may be locked, and only when it is used.
	if err := tryPage(fd); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func newMemfdPage() (*os.File, error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("keybroker", flags|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("keybroker", flags)
	}
	if err != nil {
		return nil, fmt.Errorf("making a page with memfd_create: %w", err)
	}
	f := os.NewFile(uintptr(fd), "keybroker page")
	if err := unix.Ftruncate(fd, pageSize); err != nil {
		return nil, errors.Join(fmt.Errorf("sizing a page: %w", err), f.Close())
	}
	if err := addSeals(fd, sizeSeals); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// PageKind says what memory the page is made of: PageSecret or PageMemfd. It fails with ErrForeignPage when it is neither.
func PageKind(f *os.File) (string, error) {
	var kind string
	err := control(f, func(fd int) (err error) {
		kind, err = pageKind(fd)
		return err
	})
	return kind, err
}

func pageKind(fd int) (string, error) {
	var fs unix.Statfs_t
	var st unix.Stat_t
	if err := errors.Join(unix.Fstatfs(fd, &fs), unix.Fstat(fd, &st)); err != nil {
		return "", fmt.Errorf("%w: %w", ErrForeignPage, err)
	}
	if st.Size != pageSize {
		return "", fmt.Errorf("%w: it has %d octets, not %d", ErrForeignPage, st.Size, pageSize)
	}
	if fs.Type == unix.SECRETMEM_MAGIC {
		return PageSecret, nil
	}
	// Only a memfd has seals; a file in a tmpfs cannot be sealed, and one that can shrink would kill who has it mapped.
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if fs.Type == unix.TMPFS_MAGIC && err == nil && seals&sizeSeals == sizeSeals {
		return PageMemfd, nil
	}
	return "", ErrForeignPage
}

// FillPage writes the realm of these masters, in the order of their generations from 1, into a page that is still empty:
// what is extracted from each master, never the masters. It fails with ErrPageFilled if the page is not empty, and leaves
// it empty on any other error.
func FillPage(f *os.File, masters []Master) error {
	err := control(f, func(fd int) error {
		kind, err := pageKind(fd)
		if err != nil {
			return err
		}
		if err := fillMapped(fd, kind, masters); err != nil {
			return err
		}
		if kind == PageMemfd {
			return addSeals(fd, unix.F_SEAL_WRITE|unix.F_SEAL_SEAL)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("filling the secret page: %w", err)
	}
	return nil
}

func fillMapped(fd int, kind string, masters []Master) error {
	page, err := unix.Mmap(fd, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if errors.Is(err, unix.EPERM) && kind == PageMemfd {
		return ErrPageFilled // sealed against writing
	}
	if err != nil {
		return fmt.Errorf("mapping it: %w", err)
	}
	err = protectPage(page, kind)
	if err == nil {
		err = fillPage(page, masters)
	}
	return errors.Join(err, unix.Munmap(page))
}

// mapPage maps a page for reading only.
func mapPage(fd int) ([]byte, error) {
	kind, err := pageKind(fd)
	if err != nil {
		return nil, err
	}
	flags := unix.MAP_SHARED
	if kind == PageMemfd {
		// Kernels before 6.7 do not map shared what is sealed against writing; a private mapping that is never written
		// shows the same memory.
		flags = unix.MAP_PRIVATE
	}
	page, err := unix.Mmap(fd, 0, pageSize, unix.PROT_READ, flags)
	if err != nil {
		return nil, fmt.Errorf("mapping the secret page: %w", err)
	}
	if err := protectPage(page, kind); err != nil {
		return nil, err
	}
	return page, nil
}

// protectPage does to a memfd's mapping what secret memory is by itself: no swap, no core dump.
func protectPage(page []byte, kind string) error {
	if kind == PageSecret {
		return nil
	}
	if err := unix.Mlock(page); err != nil {
		return fmt.Errorf("locking the page in memory (LimitMEMLOCK= must allow %d octets): %w", pageSize, err)
	}
	if err := unix.Madvise(page, unix.MADV_DONTDUMP); err != nil {
		return fmt.Errorf("keeping the page out of core dumps: %w", err)
	}
	return nil
}

func tryPage(fd int) error {
	page, err := unix.Mmap(fd, 0, pageSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("mapping a new secret page (LimitMEMLOCK= must allow %d octets): %w", pageSize, err)
	}
	return unix.Munmap(page)
}

func addSeals(fd, seals int) error {
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("sealing the page: %w", err)
	}
	return nil
}

// control runs f with a file's descriptor, which stays open meanwhile and keeps its blocking mode.
func control(file *os.File, f func(fd int) error) error {
	conn, err := file.SyscallConn()
	if err != nil {
		return fmt.Errorf("%w: %w", ErrForeignPage, err)
	}
	if ctlErr := conn.Control(func(fd uintptr) { err = f(int(fd)) }); ctlErr != nil {
		return fmt.Errorf("%w: %w", ErrForeignPage, ctlErr)
	}
	return err
}
