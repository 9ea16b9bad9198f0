package derive

import (
	"context"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"sync"
	"time"
)

// Descriptors that a keyholder process inherits.
const (
	HolderPageFD   = 3 // the filled secret page
	HolderSocketFD = 4 // the socket that it answers on
)

const (
	// helloTimeout is for a process to start on a machine that is booting.
	helloTimeout = 15 * time.Second
	// exitGrace is for a keyholder to exit by itself once its socket is closed.
	exitGrace = 2 * time.Second
	// maxWaiting and maxUnsent bound what piles up for a keyholder that has stopped answering.
	maxWaiting = 16 << 10
	maxUnsent  = 8 << 20
	// maxIdle is how large a buffer is kept for the next requests.
	maxIdle = 1 << 20
)

// Errors of a Holder that callers match.
var (
	// ErrHolderGone means that the keyholder process ended or was closed. A new one is started from the same page.
	ErrHolderGone = errors.New("the keyholder is gone")
	// ErrHolderBusy means that more requests wait for the keyholder than it is given at once.
	ErrHolderBusy = errors.New("the keyholder does not keep up")
)

// HolderConfig says how a keyholder process is started.
type HolderConfig struct {
	// Command is the process's argv, its first element a path, for example {"/proc/self/exe", "keyholder-serve"}; it must come to call
	// ServeHolder(HolderPageFD, HolderSocketFD). Empty is an error.
	Command []string
}

// Holder is the client of a keyholder process. All methods are safe for concurrent use; requests that are made at the same
// time cross to the process together.
type Holder struct {
	conn *os.File
	cmd  *exec.Cmd
	wake chan struct{} // has room for one: out is not empty
	done chan struct{}
	err  error // set before done is closed

	realm    RealmID
	identity ed25519.PublicKey

	mu      sync.Mutex
	out     []byte  // frames that are not written yet
	waiting []*call // whose answers have not come yet, in the order of their frames
	gone    error   // set once: nothing more is sent
}

// call is one request that waits for its answer.
type call struct {
	ready  chan struct{} // has room for one: the fields below are set
	status byte
	result []byte
	err    error
}

var calls = sync.Pool{New: func() any { return &call{ready: make(chan struct{}, 1)} }}

// StartHolder starts a keyholder from a filled page and waits until it has locked itself down and said hello, within ctx
// and at most 15 seconds; afterwards ctx has no effect. Errors are ErrEmptyPage, ErrForeignPage and ErrLockdown as the
// keyholder tells them, or ErrHolderGone when it ended without a word. The page stays the caller's, who closes it. The
// process gets an almost empty environment and this process's standard error, and ends when the Holder is closed or this
// process ends in any way.
func StartHolder(ctx context.Context, page *os.File, config HolderConfig) (*Holder, error) {
	if len(config.Command) == 0 {
		return nil, errors.New("starting the keyholder: no command is configured")
	}
	h, err := startProcess(page, config.Command)
	if err != nil {
		return nil, fmt.Errorf("starting the keyholder: %w", err)
	}
	if err := h.hello(ctx); err != nil {
		_ = h.Close() // what it says is in err, or follows from the close
		return nil, fmt.Errorf("starting the keyholder: %w", err)
	}
	return h, nil
}

func startProcess(page *os.File, argv []string) (*Holder, error) {
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{
		Path:       argv[0],
		Args:       append([]string{os.Args[0]}, argv[1:]...), // `ps` shows this program's name, not /proc/self/exe
		Env:        []string{"GOMAXPROCS=1"},
		Stderr:     os.Stderr,
		ExtraFiles: []*os.File{page, theirs},
	}
	err = cmd.Start()
	_ = theirs.Close()
	if err != nil {
		return nil, errors.Join(err, ours.Close())
	}
	return &Holder{conn: ours, cmd: cmd, wake: make(chan struct{}, 1), done: make(chan struct{})}, nil
}

func (h *Holder) hello(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	// Queued before anything is read: a keyholder that cannot work says so without reading the question.
	c := calls.Get().(*call)
	err := h.send(c, request{op: opHello})
	go h.writeLoop()
	go h.readLoop()
	if err != nil {
		return err
	}
	b, err := h.await(ctx, c)
	if errors.Is(err, ErrHolderGone) {
		<-h.done // for how it ended
		return h.err
	}
	if err != nil {
		return err
	}
	if len(b) != helloSize || binary.BigEndian.Uint32(b) != wireVersion {
		return errors.New("it is a program of another version")
	}
	h.realm = RealmID(b[4:])
	h.identity = slices.Clone(b[4+RealmIDSize:])
	return nil
}

// Realm returns the id of the realm that the page holds.
func (h *Holder) Realm() RealmID { return h.realm }

// Identity returns the realm's public key, which verifies what Sign signed.
func (h *Holder) Identity() ed25519.PublicKey { return slices.Clone(h.identity) }

// PID returns the keyholder's process id.
func (h *Holder) PID() int { return h.cmd.Process.Pid }

// ServiceKey derives the key of a service or container from a generation (from 1), in an epoch (from 1), of length octets
// (32 or 64).
func (h *Holder) ServiceKey(ctx context.Context, generation uint32, name string, epoch uint32, length int) (ServiceKey, error) {
	info, err := ServiceInfo(name, epoch, length)
	if err != nil {
		return ServiceKey{}, fmt.Errorf("deriving a service key: %w", err)
	}
	key, err := h.derive(ctx, generation, info, length)
	if err != nil {
		return ServiceKey{}, fmt.Errorf("deriving a service key: %w", err)
	}
	return ServiceKey{newSecret(key)}, nil
}

// VMKey derives a key of a virtual machine from a generation (from 1).
func (h *Holder) VMKey(ctx context.Context, generation uint32, id VMKeyID) (VMKey, error) {
	info, err := VMInfo(id.Tier, id.Subject, id.Name, id.Epoch, id.Length)
	if err != nil {
		return VMKey{}, fmt.Errorf("deriving a VM key: %w", err)
	}
	key, err := h.derive(ctx, generation, info, id.Length)
	if err != nil {
		return VMKey{}, fmt.Errorf("deriving a VM key: %w", err)
	}
	return VMKey{newSecret(key)}, nil
}

// Sign returns the identity's signature as Schedule.Sign does, with the same bounds.
func (h *Holder) Sign(ctx context.Context, label string, fields ...[]byte) ([]byte, error) {
	message := signedTuple(label, fields)
	if err := checkSigned(message); err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	signature, err := h.ask(ctx, request{op: opSign, message: message})
	if err == nil && len(signature) != ed25519.SignatureSize {
		err = fmt.Errorf("the keyholder answered %d octets, not a signature", len(signature))
	}
	if err != nil {
		return nil, fmt.Errorf("signing: %w", err)
	}
	return signature, nil
}

// Done is closed when the keyholder process has ended; Err says how.
func (h *Holder) Done() <-chan struct{} { return h.done }

// Err returns nil until Done is closed, and then an ErrHolderGone that says how the process ended.
func (h *Holder) Err() error {
	select {
	case <-h.done:
		return h.err
	default:
		return nil
	}
}

// Close ends the keyholder, fails requests that wait with ErrHolderGone, and returns when the process has ended, after two
// seconds by force. It can be called again.
func (h *Holder) Close() error {
	h.fail(fmt.Errorf("%w: it was closed", ErrHolderGone))
	<-h.done
	return nil
}

func (h *Holder) derive(ctx context.Context, generation uint32, info []byte, length int) ([]byte, error) {
	key, err := h.ask(ctx, request{op: opDerive, generation: generation, length: length, info: info})
	if err == nil && len(key) != length {
		return nil, fmt.Errorf("the keyholder answered %d octets, not %d", len(key), length)
	}
	return key, err
}

// ask sends a request and waits for its answer, which is the caller's own.
func (h *Holder) ask(ctx context.Context, r request) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	c := calls.Get().(*call)
	if err := h.send(c, r); err != nil {
		calls.Put(c)
		return nil, err
	}
	return h.await(ctx, c)
}

// await waits for the answer to a call that was sent, and gives the call back.
func (h *Holder) await(ctx context.Context, c *call) ([]byte, error) {
	select {
	case <-c.ready:
	case <-ctx.Done():
		// The answer still comes in its turn, into a call that nobody uses again.
		return nil, fmt.Errorf("waiting for the keyholder: %w", ctx.Err())
	}
	status, result, err := c.status, c.result, c.err
	c.result, c.err = nil, nil
	calls.Put(c)
	if err == nil && status != statusOK {
		err = statusError(status)
	}
	if err != nil {
		return nil, err
	}
	return result, nil
}

// send queues a request. What other callers queue until the writer comes round goes out in the same write.
func (h *Holder) send(c *call, r request) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.gone != nil {
		return h.gone
	}
	if len(h.waiting) >= maxWaiting || len(h.out) >= maxUnsent {
		return fmt.Errorf("%w: %d requests wait for it", ErrHolderBusy, len(h.waiting))
	}
	h.out = r.appendFrame(h.out)
	h.waiting = append(h.waiting, c)
	select {
	case h.wake <- struct{}{}:
	default:
	}
	return nil
}

func (h *Holder) writeLoop() {
	var batch []byte
	for {
		if cap(batch) > maxIdle {
			batch = nil
		}
		select {
		case <-h.wake:
		case <-h.done:
			return
		}
		runtime.Gosched() // lets callers that are ready queue theirs too: under load that more than doubles the rate
		h.mu.Lock()
		batch, h.out = h.out, batch[:0]
		h.mu.Unlock()
		if _, err := h.conn.Write(batch); err != nil {
			h.fail(fmt.Errorf("%w: %w", ErrHolderGone, err))
		}
	}
}

// readLoop hands out answers until there are no more, and then sees the process to its end.
func (h *Holder) readLoop() {
	h.fail(fmt.Errorf("%w: %w", ErrHolderGone, h.readAnswers()))
	h.reap()
}

func (h *Holder) readAnswers() error {
	buf := make([]byte, 64<<10)
	have := 0
	for {
		n, err := h.conn.Read(buf[have:])
		rest, deliverErr := h.deliver(buf[:have+n])
		left := copy(buf, rest)
		clear(buf[left : have+n])
		have = left
		if err = errors.Join(deliverErr, err); err != nil {
			return err
		}
	}
}

// deliver gives every complete answer in b to the call that it belongs to, and returns what is left.
func (h *Holder) deliver(b []byte) (rest []byte, err error) {
	for {
		body, rest, ok, err := splitFrame(b, maxAnswer)
		if err != nil || !ok {
			return b, err
		}
		c := h.next()
		if c == nil {
			return nil, errors.New("it answered what nobody asked")
		}
		c.status, c.result = body[0], slices.Clone(body[1:])
		c.ready <- struct{}{}
		b = rest
	}
}

func (h *Holder) next() *call {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.waiting) == 0 {
		return nil
	}
	c := h.waiting[0]
	h.waiting[0] = nil
	h.waiting = h.waiting[1:]
	return c
}

// fail ends the service: the first reason counts, whoever waits gets it at once, and the closed socket ends the process.
func (h *Holder) fail(reason error) {
	h.mu.Lock()
	waiting := h.waiting
	if h.gone == nil {
		h.gone = reason
	}
	reason, h.waiting, h.out = h.gone, nil, nil
	h.mu.Unlock()
	_ = h.conn.Close()
	for _, c := range waiting {
		c.err = reason
		c.ready <- struct{}{}
	}
}

// reap waits for the process, kills it if it stays, and says how it ended.
func (h *Holder) reap() {
	kill := time.AfterFunc(exitGrace, func() { _ = h.cmd.Process.Kill() })
	err := h.cmd.Wait()
	kill.Stop()
	h.mu.Lock()
	reason := h.gone
	h.mu.Unlock()
	if err == nil {
		h.err = reason
	} else {
		h.err = fmt.Errorf("%w: its process ended with %w", reason, err)
	}
	close(h.done)
}
