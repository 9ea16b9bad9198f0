package tpm2

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"time"

	gotpm "github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"
)

const (
	headerSize   = 10   // tag, size, code. See TPM 2.0 Library, part 1, section 18.
	maxResponse  = 4096 // octets; the kernel's buffer has as many
	commandTime  = 20 * time.Second
	firstPause   = 5 * time.Millisecond
	retryTimeout = 5 * time.Second
)

// A device is an open TPM: the kernel's /dev/tpmrm0 or /dev/tpm0, or the Unix socket of an emulator. Not safe for concurrent use.
type device struct {
	ctx context.Context
	rw  io.ReadWriteCloser
	// alone: nobody else talks to the TPM while this connection lasts, and nothing flushes what a killed client left in it.
	alone bool
	// tap sees every command and response; tests listen to the bus by it.
	tap func([]byte)
}

// openDevice opens the TPM at path, for as long as ctx lasts.
func openDevice(ctx context.Context, path string) (*device, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: there is no %s", ErrMissing, path)
	case err != nil:
		return nil, fmt.Errorf("opening the TPM: %w", err)
	}
	d := &device{ctx: ctx}
	switch kind := info.Mode().Type(); {
	case kind == fs.ModeSocket:
		d.alone = true
		d.rw, err = new(net.Dialer).DialContext(ctx, "unix", path)
	case kind&fs.ModeCharDevice != 0:
		d.rw, err = openCharDevice(path)
	default:
		return nil, fmt.Errorf("%w: %s is neither a device nor a socket", ErrMissing, path)
	}
	if err != nil {
		return nil, explainOpen(path, err)
	}
	return d, nil
}

// openCharDevice opens without O_NONBLOCK, by which a read would not wait for the response.
func openCharDevice(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

func explainOpen(path string, err error) error {
	switch {
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: nothing answers at %s", ErrMissing, path)
	case errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: another program holds %s; /dev/tpmrm0 can be shared", ErrBusy, path)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("opening the TPM: this user may not open %s (its group is usually tss): %w", path, fs.ErrPermission)
	}
	return fmt.Errorf("opening the TPM at %s: %w", path, err)
}

// Close closes the device. It flushes nothing.
func (d *device) Close() error { return d.rw.Close() }

var _ transport.TPM = (*device)(nil)

// Send executes one command. What the TPM puts off is asked again, for at most 5 s.
func (d *device) Send(command []byte) ([]byte, error) {
	pause := firstPause
	giveUp := time.Now().Add(retryTimeout)
	for {
		response, err := d.exchange(command)
		if err != nil {
			return nil, fmt.Errorf("talking to the TPM: %w", err)
		}
		if !isLater(responseCode(response)) || time.Now().Add(pause).After(giveUp) {
			return response, nil
		}
		select {
		case <-d.ctx.Done():
			return nil, context.Cause(d.ctx)
		case <-time.After(pause):
			pause *= 2
		}
	}
}

func responseCode(response []byte) gotpm.TPMRC {
	return gotpm.TPMRC(binary.BigEndian.Uint32(response[6:]))
}

// exchange writes one command and reads one response.
func (d *device) exchange(command []byte) ([]byte, error) {
	if err := d.ctx.Err(); err != nil {
		return nil, context.Cause(d.ctx)
	}
	if c, ok := d.rw.(net.Conn); ok {
		limit := time.Now().Add(commandTime)
		if t, ok := d.ctx.Deadline(); ok && t.Before(limit) {
			limit = t
		}
		if err := c.SetDeadline(limit); err != nil {
			return nil, err
		}
	}
	if _, err := d.rw.Write(command); err != nil {
		return nil, err
	}
	response, err := readResponse(d.rw)
	if err == nil && d.tap != nil {
		d.tap(command)
		d.tap(response)
	}
	return response, err
}

// readResponse reads by the response's own length, which a stream may deliver in pieces and a device delivers at once.
func readResponse(r io.Reader) ([]byte, error) {
	buf := make([]byte, maxResponse)
	n, err := io.ReadAtLeast(r, buf, headerSize)
	if err != nil {
		return nil, fmt.Errorf("reading a response: %w", err)
	}
	size := binary.BigEndian.Uint32(buf[2:])
	if size < headerSize || size > maxResponse || int(size) < n {
		return nil, fmt.Errorf("reading a response: it says that it has %d octets", size)
	}
	if _, err := io.ReadFull(r, buf[n:size]); err != nil {
		return nil, fmt.Errorf("reading a response: %w", err)
	}
	return buf[:size], nil
}

// flushLeftovers frees what killed clients left in a TPM that has no resource manager.
func (d *device) flushLeftovers() error {
	for _, first := range []gotpm.TPMHandle{firstTransient, firstHMACSession} {
		r, err := gotpm.GetCapability{Capability: gotpm.TPMCapHandles, Property: uint32(first), PropertyCount: 64}.Execute(d)
		if err != nil {
			return err
		}
		handles, err := r.CapabilityData.Data.Handles()
		if err != nil {
			return err
		}
		for _, h := range handles.Handle {
			if _, err := (gotpm.FlushContext{FlushHandle: h}).Execute(d); err != nil {
				return err
			}
		}
	}
	return nil
}

// See TPM 2.0 Library, part 2, section 7.4. All loaded sessions are listed from here on, policy sessions too.
const (
	firstTransient   gotpm.TPMHandle = 0x80000000
	firstHMACSession gotpm.TPMHandle = 0x02000000
)
