//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-configfs-tsm/configfs/linuxtsm"
	"github.com/google/go-configfs-tsm/report"
	"golang.org/x/sys/unix"

	"keybroker/inject"
)

const (
	reportTime  = 20 * time.Second // within a handshake
	reportTries = 5
	snpProvider = "sev_guest" // the kernel's driver
	configfs    = "/sys/kernel/config"

	configfsMagic = 0x62656570 // statfs(2)

	// A report's size in octets, and where REPORT_DATA is (SNP ABI, section 7.3). attest/snp knows them too, but the agent verifies
	// no reports, and links nothing that does.
	reportSize   = 1184
	reportDataAt = 0x50
)

// platform gets attestation reports from the kernel, one at a time (configfs-tsm).
type platform struct {
	console *console
	client  func() (configfsi.Client, error)
	busy    chan struct{} // full while the kernel is asked
}

func newPlatform(out *console) *platform {
	return &platform{console: out, client: linuxtsm.MakeClient, busy: make(chan struct{}, 1)}
}

// attest returns a fresh report whose REPORT_DATA is t, and behind it the certificates that the host gave, if any. The kernel
// may wait for the host for as long as that likes: then attest ends without it.
func (p *platform) attest(ctx context.Context, t inject.Transcript) ([]byte, error) {
	select {
	case p.busy <- struct{}{}:
	default:
		return nil, errors.New("the platform has not answered an earlier request: the host holds it up (dmesg in this machine may say more)")
	}
	type answer struct {
		evidence []byte
		err      error
	}
	done := make(chan answer, 1)
	go func() {
		defer func() { <-p.busy }()
		evidence, err := p.evidence(t)
		done <- answer{evidence, err}
	}()
	ctx, cancel := context.WithTimeout(ctx, reportTime)
	defer cancel()
	select {
	case a := <-done:
		if a.err == nil {
			p.console.mark(stepReport)
		}
		return a.evidence, a.err
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.Canceled) { // the agent was told to end
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("the platform gave no report in time (%w): the host holds it up (dmesg in this machine may say more)", ctx.Err())
	}
}

// evidence asks the kernel, and holds what it gives to what the protocol takes.
func (p *platform) evidence(t inject.Transcript) ([]byte, error) {
	p.console.sayOnce("asking", "asking the platform for a report")
	began := time.Now()
	r, err := p.ask(t[:])
	if err != nil {
		return nil, fmt.Errorf("asking the platform for a report: %w", err)
	}
	provider := strings.TrimSpace(r.Provider)
	if provider != snpProvider {
		return nil, fmt.Errorf("the platform's reports are of %.40q, expected %q: this is no SEV-SNP guest", provider, snpProvider)
	}
	if len(r.OutBlob) != reportSize || !bytes.Equal(r.OutBlob[reportDataAt:reportDataAt+len(t)], t[:]) {
		return nil, fmt.Errorf("the platform's report is not this session's: %d octets, expected %d with the session's REPORT_DATA", len(r.OutBlob), reportSize)
	}
	certificates := fmt.Sprintf("%d octets of certificates", len(r.AuxBlob))
	if reportSize+len(r.AuxBlob) > inject.MaxEvidence {
		certificates += ", which is too much: they are left out"
		r.AuxBlob = nil
	}
	p.console.sayOnce("report", "the platform (%s) made a report in %d ms, with %s", provider, time.Since(began).Milliseconds(), certificates)
	return append(r.OutBlob, r.AuxBlob...), nil
}

// ask makes one report. When another program wrote into the request meanwhile, it is not ours, and is asked for anew.
func (p *platform) ask(data []byte) (*report.Response, error) {
	for try := 1; ; try++ {
		client, err := p.client()
		if err != nil {
			return nil, noReports(err)
		}
		k := &kernel{Client: client}
		r, err := report.Get(k, &report.Request{InBlob: data, GetAuxBlob: true})
		switch {
		case err == nil:
			return r, nil
		case k.cause != nil:
			return nil, k.cause
		case report.GetGenerationErr(err) == nil || try == reportTries:
			return nil, err
		}
		p.console.say("the report was made for somebody else's request (%v): asking again", err)
	}
}

// look says early what will be in the way.
func (p *platform) look() {
	if _, err := p.client(); err != nil {
		p.console.say("warning: %v", noReports(err))
	}
}

// kernel is the library's way to the kernel, bounded, and with an error that says what to do.
type kernel struct {
	configfsi.Client
	cause error
}

// MkdirTemp begins a report.
func (k *kernel) MkdirTemp(dir, pattern string) (string, error) {
	name, err := k.Client.MkdirTemp(dir, pattern)
	if errors.Is(err, unix.ENXIO) {
		k.cause = errors.New("the kernel has no driver for them: " + loadDriver)
	}
	return name, err
}

// ReadFile reads an attribute.
func (*kernel) ReadFile(name string) ([]byte, error) { return readBounded(name, 0) }

const loadDriver = "modprobe sev-guest; if that says \"No such device\", this is no SEV-SNP guest (dmesg has \"Memory Encryption Features active\")"

// noReports says why the kernel's folder for reports is not there.
func noReports(err error) error {
	var fs unix.Statfs_t
	if unix.Statfs(configfs, &fs) != nil || fs.Type != configfsMagic {
		return fmt.Errorf("%w: configfs is not mounted: modprobe configfs; mount -t configfs configfs %s", err, configfs)
	}
	var u unix.Utsname
	if e := unix.Uname(&u); e == nil && tooOld(unix.ByteSliceToString(u.Release[:])) {
		return fmt.Errorf("%w: this is Linux %s, which makes no reports there: boot 6.7 or newer", err, unix.ByteSliceToString(u.Release[:]))
	}
	return fmt.Errorf("%w: the kernel's reports (CONFIG_TSM_REPORTS, CONFIG_SEV_GUEST) are not loaded: %s", err, loadDriver)
}

// tooOld reports whether a kernel is older than 6.7, which brought configfs-tsm. One whose name says nothing is not.
func tooOld(release string) bool {
	var major, minor int
	if n, _ := fmt.Sscanf(release, "%d.%d", &major, &minor); n != 2 {
		return false
	}
	return major < 6 || major == 6 && minor < 7
}
