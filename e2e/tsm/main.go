//go:build linux

// Command tsm is the firmware of the lab's SNP-like guests: in place of /sys/kernel/config/tsm/report it makes reports that a test's
// authority signs.
package main

import (
	"crypto/rand"
	"fmt"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"keybroker/attest/snp"
	"keybroker/attest/snp/snptest"
	"keybroker/attest/snp/snptest/tsmfs"
)

const (
	reports = "/sys/kernel/config/tsm/report"
	// identity is what the guest is, read for each report; its REPORT_ID is that of this process, as of a launch.
	identity = "/etc/tsm.json"
	// bare is there while the host gives no certificates.
	bare = "/etc/tsm.bare"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintf(os.Stderr, "tsm: error: %v\n", err)
		os.Exit(1)
	}
}

func run() error {
	var launch [32]byte
	rand.Read(launch[:])
	unmount, err := tsmfs.Mount(reports, tsmfs.Platform{
		Provider: "sev_guest",
		Report:   func(data []byte, _ int) (out, aux []byte, err error) { return report(launch, data) },
	})
	if err != nil {
		return err
	}
	fmt.Printf("tsm: launch %x\n", launch)
	end := make(chan os.Signal, 1)
	signal.Notify(end, unix.SIGTERM)
	<-end
	return unmount()
}

func report(launch [32]byte, data []byte) (out, certificates []byte, err error) {
	b, err := os.ReadFile(identity)
	if err != nil {
		return nil, nil, err
	}
	g, err := snptest.ParseGuest(b)
	if err != nil {
		return nil, nil, err
	}
	g.ReportID = launch
	var reportData [snp.ReportDataSize]byte
	copy(reportData[:], data)
	out, err = g.Report(reportData)
	if _, there := os.Stat(bare); there == nil {
		return out, nil, err
	}
	return out, g.Table(), err
}
